"""A path on an object store, with as much of pathlib's interface as a job needs.

There are no folders there, only keys with slashes in them: nothing is made before a file is put, and a folder is there
while it holds something. What an object store does that a file system does not: it puts a whole object in one step, and
does so on condition (``put``).
"""

from __future__ import annotations

import glob
import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from tide_ray.data.object_client import Bucket

READ_AHEAD_BYTES = 4 << 20
ANY = "any"
NEW = "new"


class UnavailableError(OSError):
    """The store does not answer, or with an error of its own. What was asked may be there or not."""


class ChangedError(OSError):
    """The object is not, or no longer, the version that was to be replaced."""


@dataclass(frozen=True, slots=True)
class ObjectFacts:
    """What the store says of an object. ``version`` is opaque: it differs after every put of other content."""

    st_size: int
    st_mtime_ns: int
    version: dict[str, Any]


@dataclass(frozen=True, order=True)
class ObjectPath:
    """``scheme://bucket/key``. ``facts`` are there on paths from a listing, as of then.

    Methods that ask the store raise OSError with the URL in ``filename`` and a reason in ``strerror``:
    FileNotFoundError, PermissionError, or UnavailableError.
    """

    scheme: str
    bucket: str
    key: str
    facts: ObjectFacts | None = field(default=None, compare=False, repr=False)

    @classmethod
    def parse(cls, url: str) -> ObjectPath:
        scheme, _, rest = url.partition("://")
        bucket, _, key = rest.partition("/")
        return cls(scheme, bucket, key.strip("/"))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> ObjectPath:
        return self._at(f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.key).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> ObjectPath:
        return self._at(self.key.rpartition("/")[0])

    def with_name(self, name: str) -> ObjectPath:
        return self.parent / name

    def relative_to(self, folder: ObjectPath) -> PurePosixPath:
        return PurePosixPath(self.key).relative_to(folder.key)

    def exists(self) -> bool:
        """Whether there is an object by this name; see ``is_dir`` for folders."""
        if self.facts is not None:
            return True
        try:
            self._bucket.head(self.key)
        except FileNotFoundError:
            return False
        return True

    is_file = exists

    def is_dir(self) -> bool:
        """Whether something lies below it."""
        return next(self._bucket.below(self.key), None) is not None

    def stat(self) -> ObjectFacts:
        return self.facts or self._bucket.head(self.key)

    def iterdir(self) -> Iterator[ObjectPath]:
        """What lies directly in it: objects, and folders without facts."""
        found, folders = self._bucket.directly_in(self.key)
        yield from (self._at(key, facts) for key, facts in found)
        yield from (self._at(key) for key in folders)

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Objects directly in it whose names match."""
        found, _ = self._bucket.directly_in(self.key)
        yield from (self._at(key, facts) for key, facts in found if fnmatchcase(key.rpartition("/")[2], pattern))

    def rglob(self, pattern: str) -> Iterator[ObjectPath]:
        """Objects anywhere below it whose names match."""
        for key, facts in self._bucket.below(self.key):
            if fnmatchcase(key.rpartition("/")[2], pattern):
                yield self._at(key, facts)

    def folder_matches(self) -> list[ObjectPath]:
        """The folders that this path names when it is read as a pattern, whose parts each match one name."""
        found = [self._at("")]
        for part in self.key.split("/"):
            if glob.has_magic(part):
                inner = (path for folder in found for path in folder.iterdir() if path.facts is None)
                found = [path for path in inner if _is_match([path.name], [part])]
            else:
                found = [folder / part for folder in found]
        return sorted(path for path in found if path.is_dir())

    def matches(self) -> list[ObjectPath]:
        """The objects that this path names when it is read as a pattern; ``**`` stands for any number of folders."""
        patterns = self.key.split("/")
        literal = patterns[:-1]
        while literal and glob.has_magic("/".join(literal)):
            literal.pop()
        return sorted(
            self._at(key, facts)
            for key, facts in self._bucket.below("/".join(literal))
            if _is_match(key.split("/"), patterns)
        )

    def read_bytes(self) -> bytes:
        return self._bucket.get(self.key)[0]

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def read_version(self) -> tuple[str, dict[str, Any]]:
        """The text, and the version that it is; see ``put``."""
        content, version = self._bucket.get(self.key)
        return content.decode(), version

    def put(self, content: bytes | BinaryIO, only_if: dict[str, Any] | str = ANY) -> dict[str, Any]:
        """Write the whole object, visible in one step. Returns its version.

        Args:
            only_if: a version, to replace no other; NEW, to replace nothing.

        Raises:
            FileExistsError: for NEW, there is one.
            ChangedError: for a version, there is another or none.
        """
        return self._bucket.put(self.key, content, only_if)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.put(text.encode(encoding))

    def touch(self) -> None:
        self.put(b"")

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete it. One that is missing is no error to the store, whatever ``missing_ok``."""
        self._bucket.delete([self.key])

    def copy_to(self, target: ObjectPath) -> None:
        """Have the store copy it, within one bucket."""
        self._bucket.copy(self.key, target.key)

    def remove_below(self) -> None:
        """Delete all that lies below it."""
        self._bucket.delete([key for key, _ in self._bucket.below(self.key)])

    def open(self, mode: str = "rb", buffering: int = READ_AHEAD_BYTES) -> BinaryIO:
        """The object as a file to read; ``buffering`` 0 fetches only what is asked for, which suits Parquet."""
        assert mode == "rb", "objects are written whole, by put"
        reader = _ObjectReader(self._bucket, self.key, self.stat().st_size)
        return reader if buffering == 0 else io.BufferedReader(reader, buffering)  # type: ignore[return-value]

    @cached_property
    def _bucket(self) -> Bucket:
        from tide_ray.data.object_client import bucket

        return bucket(self.scheme, self.bucket)

    def _at(self, key: str, facts: ObjectFacts | None = None) -> ObjectPath:
        return replace(self, key=key, facts=facts)

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectPath, (self.scheme, self.bucket, self.key)


class _ObjectReader(io.RawIOBase):
    """Reads ranges of an object, one request each."""

    def __init__(self, bucket: Bucket, key: str, size: int) -> None:
        self._bucket = bucket
        self._key = key
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(min(len(buffer), self._size - self._position), 0)
        if count:
            buffer[:count] = self._bucket.get_range(self._key, self._position, self._position + count)
            self._position += count
        return count


def _is_match(parts: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_is_match(parts[start:], patterns[1:]) for start in range(len(parts) + 1))
    if not parts or (parts[0].startswith(".") and not patterns[0].startswith(".")):
        return False
    return fnmatchcase(parts[0], patterns[0]) and _is_match(parts[1:], patterns[1:])
