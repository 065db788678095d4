"""Where the outputs of jobs are and what is known of them: from paths as users type them to part files and run facts.

Nothing else in this package looks at the file system.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tide_ray.data.compact import has_pending
from tide_ray.data.job_folder import JOB_FILE, RUN_FILE, SUCCESS_FILE
from tide_ray.data.manifest import part_files
from tide_ray.data.parts import DATA_FOLDER, ERRORS_FOLDER
from tide_ray.data.reading import for_arrow
from tide_ray.data.schema import METADATA_PREFIX
from tide_ray.data.storage import StoragePath
from tide_ray.types import UserError


@dataclass(frozen=True, slots=True)
class JobOutput:
    """One job's output folder, finished or not.

    ``name`` is the folder's name, or its whole path where several have that name. ``facts``: what ``_job.json``, the
    parts' metadata and ``run.json`` say, the latter winning.
    """

    name: str
    path: str
    data: tuple[str, ...]
    errors: tuple[str, ...]
    facts: dict[str, Any]
    is_finished: bool


def find_outputs(paths: Sequence[str | Path]) -> list[JobOutput]:
    """The outputs in folders and globs of folders, each once, in the order given.

    Raises:
        UserError: a path holds no output of a job, or one that cannot be read now.
    """
    folders = list(dict.fromkeys(folder.resolve() for path in paths for folder in _folders(path)))
    names = [folder.name for folder in folders]
    return [
        _read(folder, folder.name if names.count(folder.name) == 1 else str(folder)) for folder in folders
    ]  # fmt: skip


def _folders(path: str | Path) -> list[Path]:
    text = str(Path(path).expanduser())
    if not glob.has_magic(text) or Path(text).is_dir():
        if not _holds_output(Path(text)):
            raise UserError(f"output: no job in {str(path)!r}")
        return [Path(text)]
    found = [Path(match) for match in sorted(glob.glob(text)) if _holds_output(Path(match))]
    if not found:
        raise UserError(f"output: no folder of a job matches {str(path)!r}")
    return found


def _holds_output(folder: Path) -> bool:
    return (folder / JOB_FILE).is_file() or bool(part_files(folder, DATA_FOLDER))


def _read(folder: Path, name: str) -> JobOutput:
    if has_pending(folder):
        raise UserError(f"output: compact was interrupted in {str(folder)!r}: run it again")
    data, errors = part_files(folder, DATA_FOLDER), part_files(folder, ERRORS_FOLDER)
    facts = _read_json(folder / JOB_FILE)
    for part in (data or errors)[:1]:
        facts |= _part_facts(part)
    return JobOutput(
        name=name,
        path=str(folder),
        data=tuple(map(str, data)),
        errors=tuple(map(str, errors)),
        facts=facts | _read_json(folder / RUN_FILE),
        is_finished=(folder / SUCCESS_FILE).exists(),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"output: {str(path)!r} is damaged")
    return values


def _part_facts(path: StoragePath) -> dict[str, Any]:
    """The run facts in a part's metadata; those of the engine under ``engine``, as ``run.json`` has them."""
    try:
        metadata = pq.read_metadata(for_arrow(path)).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"output: {str(path)!r} is damaged: {' '.join(str(error).split())}") from None
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
