"""What a finished job consists of: every part file with its rows, size and checksum, in ``_manifest.json``.

Written by the owner of the folder once all rows are committed. Until then the part files alone are the record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tide_ray.data.parts import DATA_FOLDER, ERRORS_FOLDER, part_checksum
from tide_ray.types import UserError

MANIFEST_FILE = "_manifest.json"


@dataclass(frozen=True, slots=True)
class PartRecord:
    """One part file. ``path`` is relative to the job's folder, ``body_sha256`` what ``parts`` writes in the footer."""

    path: str
    rows: int
    bytes: int
    body_sha256: str | None


def part_files(folder: Path, kind: str) -> list[Path]:
    """The committed parts of ``data`` or ``errors``, in a fixed order."""
    return sorted((folder / kind).glob("*.parquet"))


def read_parts(folder: Path, kind: str, columns: list[str]) -> Iterator[pa.Table]:
    """These columns of all parts, a part at a time. Raises UserError for a part that cannot be read."""
    for path in part_files(folder, kind):
        try:
            yield pq.read_table(path, columns=columns, partitioning=None)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"output: {str(path)!r} is damaged: {' '.join(str(error).split())}") from None


def make_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of what is committed in ``folder`` now, as JSON holds it."""
    records = []
    for path in (*part_files(folder, DATA_FOLDER), *part_files(folder, ERRORS_FOLDER)):
        metadata = pq.read_metadata(path)
        name = str(path.relative_to(folder))
        records.append(PartRecord(name, metadata.num_rows, path.stat().st_size, part_checksum(metadata)))
    return {"parts": [asdict(record) for record in records]}


def load_manifest(folder: Path) -> dict[str, PartRecord] | None:
    """The records by path, None when there is no manifest. Raises UserError for a damaged one."""
    path = folder / MANIFEST_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        records = [PartRecord(**part) for part in values["parts"]]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"output: {str(path)!r} is damaged") from None
    return {record.path: record for record in records}
