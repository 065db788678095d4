"""Which parts are the job's, on an object store.

In a shared folder a writer that outlived its attempt has nothing to rename any more, and every part that is there
counts. A put cannot be taken back like that: it may be on its way for as long as the network likes, whatever its writer
looked at before. So each attempt writes down, once it owns the output and before it looks at what is committed, its own
name and the parts that it found. Those and its own are the job's. A part of another attempt that comes later was never
part of it: its rows are generated again, and it is removed before the job is finished, as a reader would count it.

Parts never replace one another (see ``parts.write_part``), so one that counts stays as it was found. The record is
replaced only on condition that it is still the one that was read: an attempt that lost the output cannot bring its
view back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from tide_ray.data.object_path import NEW, ChangedError, ObjectPath
from tide_ray.data.storage import StoragePath, files_in, name_below
from tide_ray.types import JobError

ADOPTION_FILE = "_attempt.json"


@dataclass(frozen=True, slots=True)
class Adoption:
    """What the attempt that owns the output counts: ``parts``, by name below the folder, and those of its own."""

    attempt: str
    parts: frozenset[str]

    def counts(self, name: str) -> bool:
        return name in self.parts or name.rpartition("/")[2].startswith(own_prefix(self.attempt))


def own_prefix(attempt: str) -> str:
    """What the names of an attempt's parts begin with."""
    return f"part-{attempt}-"


def adopt_parts(
    folder: StoragePath, attempt: str, kinds: Collection[str], finished: Callable[[], Collection[str] | None]
) -> None:
    """Have the attempt count what there is now and counted before; nothing to do in a shared folder.

    Args:
        kinds: the folders of parts.
        finished: gives all that counts, where the job is finished and says so itself; else None.

    Raises:
        JobError: another attempt has begun meanwhile.
    """
    if not isinstance(folder, ObjectPath):
        return
    before, version = _read(folder)
    found = {f"{kind}/{path.name}" for kind in kinds for path in (folder / kind).glob("*.parquet")}
    if (listed := finished()) is not None:
        found &= set(listed)
    elif before is not None:
        found = {name for name in found if before.counts(name)}
    _write(folder, Adoption(attempt, frozenset(found)), version)


def disown(folder: StoragePath, names: Collection[str]) -> None:
    """Do not count these parts any more, which are about to be removed: a late copy of one must not count again."""
    before, version = _read(folder)
    if before is not None:
        _write(folder, Adoption(before.attempt, before.parts - set(names)), version)


def counted(folder: StoragePath, paths: Collection[StoragePath]) -> Iterator[StoragePath]:
    """Those of ``paths`` that are the job's: all of them in a shared folder."""
    adoption, _ = _read(folder)
    for path in paths:
        if adoption is None or adoption.counts(name_below(folder, path)):
            yield path


def late_parts(folder: StoragePath, kinds: Collection[str]) -> list[StoragePath]:
    """Parts that are not the job's, since attempts that were over wrote them."""
    adoption, _ = _read(folder)
    if adoption is None:
        return []
    paths = [path for kind in kinds for path in files_in(folder / kind, "*.parquet")]
    return [path for path in paths if not adoption.counts(name_below(folder, path))]


def _read(folder: StoragePath) -> tuple[Adoption | None, dict[str, Any] | str]:
    """The record, None where there is none, and the condition to replace it on."""
    if not isinstance(folder, ObjectPath):
        return None, NEW
    try:
        text, version = (folder / ADOPTION_FILE).read_version()
    except FileNotFoundError:
        return None, NEW
    values = json.loads(text)
    return Adoption(values["attempt"], frozenset(values["parts"])), version


def _write(folder: StoragePath, adoption: Adoption, only_if: dict[str, Any] | str) -> None:
    assert isinstance(folder, ObjectPath)
    text = json.dumps({"attempt": adoption.attempt, "parts": sorted(adoption.parts)}, indent=1)
    try:
        (folder / ADOPTION_FILE).put(text.encode(), only_if)
    except (FileExistsError, FileNotFoundError, ChangedError):
        if _read(folder)[0] == adoption:
            return  # the client put it twice, as the answer to the first was lost
        raise JobError(f"output: {str(folder)!r} was taken over by another attempt") from None
