"""Paths as users write them, and files that appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tide_ray.types import UserError


def local_path(value: str | Path, field: str) -> Path:
    """The path that a user wrote for the setting ``field``, which may begin with ``~``. Nothing is looked up.

    Raises:
        UserError: it begins with ``~NAME`` and there is no such user, or with ``~`` and this one has no home.
    """
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise UserError(f"{field}: no such home, got {str(value)!r}") from None


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write under. After the block that file takes its place, unless the block raised."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
