"""Where the outputs of jobs are and what is known of them: from paths as users type them to part files and run facts.

Nothing else in this package lists folders.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tide_ray.data.compact import has_pending
from tide_ray.data.job_folder import JOB_FILE, RUN_FILE, SUCCESS_FILE
from tide_ray.data.manifest import part_files
from tide_ray.data.object_path import ObjectPath
from tide_ray.data.parts import DATA_FOLDER, ERRORS_FOLDER
from tide_ray.data.reading import damage_named, for_arrow
from tide_ray.data.schema import METADATA_PREFIX
from tide_ray.data.storage import StoragePath, absolute, storage_path
from tide_ray.types import UserError


@dataclass(frozen=True, slots=True)
class JobOutput:
    """One job's output folder, finished or not.

    ``name`` is the folder's name, or its whole path where several have that name. ``data``, ``errors``: its parts, on
    an object store as they were listed. ``facts``: what ``_job.json``, the parts' metadata and ``run.json`` say, the
    latter winning.
    """

    name: str
    path: str
    data: tuple[StoragePath, ...]
    errors: tuple[StoragePath, ...]
    facts: dict[str, Any]
    is_finished: bool


def find_outputs(paths: Sequence[str | Path]) -> list[JobOutput]:
    """The outputs in folders and globs of folders, each once, in the order given.

    Raises:
        UserError: a path holds no output of a job, or one that cannot be read now.
        UnavailableError: an object store stopped answering.
    """
    folders = list(dict.fromkeys(absolute(folder) for path in paths for folder in _folders(path)))
    names = [folder.name for folder in folders]
    return [
        _read(folder, folder.name if folder.name and names.count(folder.name) == 1 else str(folder))
        for folder in folders
    ]


def _folders(given: str | Path) -> list[StoragePath]:
    path = storage_path(given, "output")
    try:
        if not glob.has_magic(str(path)) or path.is_dir():
            if not _holds_output(path):
                raise UserError(f"output: no job in {str(given)!r}")
            return [path]
        found = [match for match in _matches(path) if _holds_output(match)]
    except OSError as error:
        raise UserError(f"output: cannot read {str(given)!r}: {error.strerror}") from None
    if not found:
        raise UserError(f"output: no folder of a job matches {str(given)!r}")
    return found


def _matches(path: StoragePath) -> Sequence[StoragePath]:
    if isinstance(path, ObjectPath):
        return path.folder_matches()
    return [Path(match) for match in sorted(glob.glob(str(path)))]


def _holds_output(folder: StoragePath) -> bool:
    return (folder / JOB_FILE).is_file() or bool(part_files(folder, DATA_FOLDER))


def _read(folder: StoragePath, name: str) -> JobOutput:
    if has_pending(folder):
        raise UserError(f"output: compact was interrupted in {str(folder)!r}: run it again")
    data, errors = part_files(folder, DATA_FOLDER), part_files(folder, ERRORS_FOLDER)
    facts = _read_json(folder / JOB_FILE)
    for part in (data or errors)[:1]:
        facts |= _part_facts(part)
    return JobOutput(
        name=name,
        path=str(folder),
        data=tuple(data),
        errors=tuple(errors),
        facts=facts | _read_json(folder / RUN_FILE),
        is_finished=(folder / SUCCESS_FILE).exists(),
    )


def _read_json(path: StoragePath) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"output: {str(path)!r} is damaged")
    return values


def _part_facts(path: StoragePath) -> dict[str, Any]:
    """The run facts in a part's metadata; those of the engine under ``engine``, as ``run.json`` has them."""
    with damage_named(path):
        metadata = pq.read_metadata(for_arrow(path)).metadata or {}
    facts = {
        name.decode().removeprefix(METADATA_PREFIX): _decoded(value.decode())
        for name, value in metadata.items()
        if name.startswith(METADATA_PREFIX.encode())
    }
    return {**facts, "engine": facts}


def _decoded(text: str) -> Any:
    """What ``schema.with_metadata`` encoded: strings are as they are, all else is JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text
