"""The files of outputs on object stores, as DuckDB opens them. Needs the extra ``s3``.

DuckDB reads S3 by itself only with an extension that is downloaded as it is first used, and that asks for credentials
in its own way. It also takes file systems of ``fsspec``; this one opens what was listed, through the client that wrote
it, and so with the same credentials, retries and errors. Every read is one request, up to 2 MiB as DuckDB makes them;
sizes and times are those of the listing.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, BinaryIO

from fsspec import AbstractFileSystem

from tide_ray.data.object_path import ObjectPath
from tide_ray.data.storage import SCHEMES


class ObjectFiles(AbstractFileSystem):
    """These files and no others, read only, by their URLs; a URL is never taken for a glob.

    Attributes:
        failure: the last error of the store. DuckDB has only its text, with a traceback.
    """

    protocol = SCHEMES
    cachable = False  # fsspec would keep it for as long as the process lives

    def __init__(self, files: Iterable[ObjectPath]) -> None:
        super().__init__()
        self._files = {str(file): file for file in files}
        self.failure: OSError | None = None

    def glob(self, path: str, **_: Any) -> list[str]:
        return [path] if path in self._files else []

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": self._files[path].stat().st_size, "type": "file"}

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp(self._files[path].stat().st_mtime_ns / 1e9, UTC)

    def open(self, path: str, mode: str = "rb", **_: Any) -> BinaryIO:
        if mode != "rb" or path not in self._files:
            raise PermissionError(f"{path} is not there to be opened as {mode!r}")
        return _Watched(self._files[path].open(buffering=0), self)  # type: ignore[return-value]


class _Watched(io.RawIOBase):
    """A file whose errors are kept."""

    def __init__(self, file: BinaryIO, files: ObjectFiles) -> None:
        self._file = file
        self._files = files

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        try:
            return self._file.readinto(buffer)  # type: ignore[attr-defined]
        except OSError as error:
            self._files.failure = error
            raise
