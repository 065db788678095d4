"""Reading files where they are: in a shared folder as ever, from an object store with few requests, or many at once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa

from tide_ray.data.object_path import READ_AHEAD_BYTES, ObjectPath, UnavailableError
from tide_ray.data.storage import CONCURRENT_REQUESTS, StoragePath, files_in
from tide_ray.messages import one_line
from tide_ray.types import UserError

Result = TypeVar("Result")


class TextFolder:
    """The files of a folder that others rewrite; on an object store those that are as before are not fetched again."""

    def __init__(self, folder: StoragePath, pattern: str) -> None:
        self.folder = folder
        self._pattern = pattern
        self._seen: dict[str, tuple[dict[str, Any], str]] = {}

    def read(self) -> list[str]:
        """Their texts, in the order of their names."""
        texts = []
        for path in files_in(self.folder, self._pattern):
            with suppress(FileNotFoundError):  # the attempt is over
                texts.append(path.read_text(encoding="utf-8") if isinstance(path, Path) else self._fetch(path))
        return texts

    def _fetch(self, path: ObjectPath) -> str:
        version = path.stat().version
        if path.name not in self._seen or self._seen[path.name][0] != version:
            self._seen[path.name] = (version, path.read_text())
        return self._seen[path.name][1]


def for_arrow(path: StoragePath, *, is_sequential: bool = False) -> str | BinaryIO:
    """What Arrow's readers take for it; they read here and there unless ``is_sequential``."""
    if isinstance(path, Path):
        return str(path)
    return path.open() if is_sequential else path.open(buffering=0)


@contextmanager
def damage_named(path: StoragePath) -> Iterator[None]:
    """What Arrow's readers raise of a file of the output, damaged or not to be read, becomes a UserError in one line.

    Raises:
        UnavailableError: an object store does not answer, which tells nothing of the file.
    """
    try:
        yield
    except UnavailableError:
        raise
    except (pa.ArrowException, OSError) as error:
        if reason := getattr(error, "strerror", None):
            raise UserError(f"output: cannot read {str(path)!r}: {reason}") from None
        raise UserError(f"output: {str(path)!r} is damaged: {one_line(error)}") from None


@contextmanager
def fetched(path: StoragePath) -> Iterator[Path]:
    """The file on this machine, for who reads all of it: itself, or a copy for the duration of the block."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.NamedTemporaryFile() as copy, path.open() as stream:
        shutil.copyfileobj(stream, copy, READ_AHEAD_BYTES)
        copy.flush()
        yield Path(copy.name)


def read_each(paths: Iterable[StoragePath], read: Callable[[Any], Result]) -> Iterator[Result]:
    """``read`` of each path, in order; on an object store some at a time, as each waits for answers."""
    paths = iter(paths)
    first = list(islice(paths, 1))
    if not first or isinstance(first[0], Path):
        yield from map(read, [*first, *paths])
        return
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        some = first
        while some:
            yield from pool.map(read, some)
            some = list(islice(paths, 4 * CONCURRENT_REQUESTS))
