"""Where a job's files are, and how one becomes visible: a folder that all nodes share, or a bucket.

Everything else works with paths and does not ask which of the two they are on. A file of a shared folder is written
under another name, fsynced and renamed; an object is put whole. The difference that matters is who can still write: a
rename fails once the attempt's scratch folder is gone, a put cannot be made to depend on another object (see
``adoption``).
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, TypeAlias, TypeVar

from tide_ray.data.object_path import NEW, ChangedError, ObjectPath
from tide_ray.files import local_path
from tide_ray.types import UserError

StoragePath: TypeAlias = Path | ObjectPath
Result = TypeVar("Result")

SCHEMES = ("s3", "gs", "az")
NEEDED_MODULES = ("boto3", "obstore")
ATTEMPT_MARK = ".attempt"
NO_VERSION = {"e_tag": '"0"', "version": "1"}
CONCURRENT_REQUESTS = 16


def storage_path(value: str | StoragePath, field: str) -> StoragePath:
    """The path that a user wrote for the setting ``field``. Nothing is looked up.

    Raises:
        UserError: as ``local_path``; a URL that cannot be one of an object store; what speaks with them is not
            installed.
    """
    if isinstance(value, ObjectPath):
        return value
    if "://" not in str(value):
        return local_path(value, field)
    url = str(value)
    scheme, _, rest = url.partition("://")
    if "@" in rest.partition("/")[0]:
        raise UserError(f"{field}: credentials do not belong into a URL, got {scheme}://***")
    if scheme not in SCHEMES or not rest.partition("/")[0]:
        raise UserError(f"{field} must be a path or {', '.join(f'{s}://BUCKET/KEY' for s in SCHEMES)}, got {url!r}")
    if not all(find_spec(name) for name in NEEDED_MODULES):
        raise UserError(f"{field}: for object stores run pip install 'tide-ray[s3]', got {url!r}")
    return ObjectPath.parse(url)


def absolute(path: StoragePath) -> StoragePath:
    return path.resolve() if isinstance(path, Path) else path


def name_below(folder: StoragePath, path: StoragePath) -> str:
    """The path relative to a folder that it is in."""
    return str(path.relative_to(folder))  # type: ignore[arg-type]


def files_in(folder: StoragePath, pattern: str) -> list[StoragePath]:
    """The files directly in a folder whose names match, in the order of their names."""
    paths: Iterable[StoragePath] = folder.glob(pattern)
    return sorted(paths, key=str)


def prepare_output(path: StoragePath) -> None:
    """Make the folder, or see that the bucket can be written to and refuses what must not be overwritten.

    Raises:
        OSError: with the reason in ``strerror``.
    """
    if isinstance(path, Path):
        path.mkdir(parents=True, exist_ok=True)
        return
    probe = path / f"_probe-{uuid.uuid4().hex}"
    probe.put(b"first", NEW)
    try:
        for condition in (NEW, NO_VERSION):
            with suppress(FileExistsError, ChangedError):
                probe.put(b"second", condition)
                raise OSError(
                    errno.ENOTSUP, "the store ignores If-None-Match or If-Match, which jobs rely on", str(path)
                )
    finally:
        probe.unlink()


def make_folder(path: StoragePath) -> None:
    """Make a folder for files to be written; on an object store there is nothing to make."""
    if isinstance(path, Path):
        path.mkdir(parents=True, exist_ok=True)


def open_attempt(scratch: StoragePath) -> None:
    """Make an attempt's scratch folder: its writers work for as long as it is there."""
    if isinstance(scratch, Path):
        scratch.mkdir(parents=True)
    else:
        (scratch / ATTEMPT_MARK).touch()


def check_attempt(scratch: StoragePath) -> None:
    """Raises FileNotFoundError when the attempt is over."""
    (scratch if isinstance(scratch, Path) else scratch / ATTEMPT_MARK).stat()


def join_attempt(folder: StoragePath) -> None:
    """Make a folder in an attempt's scratch folder if need be. Raises FileNotFoundError when the attempt is over."""
    if isinstance(folder, Path):
        # Not its parents: they would let a writer of an attempt that is over go on.
        folder.mkdir(exist_ok=True)
    else:
        check_attempt(folder.parent)


@contextmanager
def writing(path: StoragePath) -> Iterator[BinaryIO]:
    """A file to write; on an object store it is there once the block has ended, unless it raised."""
    if isinstance(path, Path):
        with path.open("wb") as stream:
            yield stream
        return
    with tempfile.TemporaryFile() as stream:
        yield stream
        stream.seek(0)
        path.put(stream)


@contextmanager
def committing(scratch: StoragePath, target: StoragePath, *, is_new: bool = False) -> Iterator[BinaryIO]:
    """A file to write that is visible as ``target``, durable and complete, once the block has ended; never before.

    Args:
        scratch: the attempt's, in the same folder or bucket; without it nothing is committed.
        is_new: on an object store, refuse to replace a file; see ``parts.write_part``.

    Raises:
        FileNotFoundError: the attempt is over.
        FileExistsError: for ``is_new``.
    """
    if isinstance(target, ObjectPath):
        with tempfile.TemporaryFile() as stream:
            yield stream
            stream.seek(0)
            check_attempt(scratch)
            target.put(stream, **({"only_if": NEW} if is_new else {}))
        return
    temporary = scratch / f"{target.name}.{uuid.uuid4().hex}"
    target.parent.mkdir(exist_ok=True)
    assert isinstance(temporary, Path)
    try:
        with temporary.open("wb") as stream:
            yield stream
        commit_file(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def commit_file(temporary: StoragePath, target: StoragePath) -> None:
    """Make ``temporary`` durable, then visible as ``target`` in one step, and gone. Both are in one folder or bucket.

    On an object store both are there for a moment; interrupted then, the call can be made again.
    """
    if isinstance(temporary, ObjectPath) and isinstance(target, ObjectPath):
        temporary.copy_to(target)
        temporary.unlink()
        return
    assert isinstance(temporary, Path)
    assert isinstance(target, Path)
    _fsync(temporary)
    os.replace(temporary, target)
    _fsync(target.parent)


def move_folder(source: StoragePath, target: StoragePath, *, last: str) -> None:
    """Move a folder to a name that is free, or holds what is left of a move that was interrupted.

    Args:
        last: the file of it that tells that all others are there.
    """
    remove_folder(target)
    if isinstance(source, ObjectPath) and isinstance(target, ObjectPath):
        for path in sorted(source.rglob("*"), key=lambda path: path.name == last):
            path.copy_to(target / str(path.relative_to(source)))
        source.remove_below()
    else:
        os.replace(str(source), str(target))


def remove_folder(path: StoragePath) -> None:
    """Remove a folder with all that is in it, as far as that goes; nothing if there is none."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.remove_below()


def replace_text(path: StoragePath, text: str) -> None:
    """Write a small file that others read meanwhile: they see the text before or this one."""
    if isinstance(path, ObjectPath):
        path.write_text(text)
        return
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


async def off_loop(path: StoragePath, call: Callable[[], Result]) -> Result:
    """``call``, which reads or writes ``path``, without keeping the event loop waiting for an object store.

    A shared folder's small files take less than a thread would.
    """
    if isinstance(path, Path):
        return call()
    return await asyncio.get_running_loop().run_in_executor(_requests(), call)


@cache
def _requests() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(CONCURRENT_REQUESTS, thread_name_prefix="tide-requests")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
