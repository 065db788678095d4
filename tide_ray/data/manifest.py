"""What a finished job consists of: every part file with its rows, size and checksum, in ``_manifest.json``.

Written by the owner of the folder once all rows are committed. Until then the part files alone are the record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tide_ray.data.adoption import counted
from tide_ray.data.parts import KINDS, part_checksum
from tide_ray.data.reading import damage_named, for_arrow, read_each
from tide_ray.data.storage import StoragePath, files_in, name_below
from tide_ray.types import UserError

MANIFEST_FILE = "_manifest.json"


@dataclass(frozen=True, slots=True)
class PartRecord:
    """One part file. ``path`` is relative to the job's folder, ``body_sha256`` what ``parts`` writes in the footer."""

    path: str
    rows: int
    bytes: int
    body_sha256: str | None


def part_files(folder: StoragePath, kind: str) -> list[StoragePath]:
    """The committed parts of ``data`` or ``errors``, or all files of another folder of parts, in a fixed order."""
    paths = files_in(folder / kind, "*.parquet")
    return list(counted(folder, paths)) if kind in KINDS else paths


def read_parts(folder: StoragePath, kind: str, columns: list[str]) -> Iterator[pa.Table]:
    """These columns of all parts, a part at a time. Raises UserError for a part that cannot be read."""

    def read(path: StoragePath) -> pa.Table:
        with damage_named(path):
            return pq.read_table(for_arrow(path), columns=columns, partitioning=None)

    yield from read_each(part_files(folder, kind), read)


def make_manifest(folder: StoragePath) -> dict[str, Any]:
    """The manifest of what is committed in ``folder`` now, as JSON holds it."""

    def record(path: StoragePath) -> dict[str, Any]:
        metadata = pq.read_metadata(for_arrow(path))
        size = path.stat().st_size
        return asdict(PartRecord(name_below(folder, path), metadata.num_rows, size, part_checksum(metadata)))

    return {"parts": list(read_each((path for kind in KINDS for path in part_files(folder, kind)), record))}


def load_manifest(folder: StoragePath) -> dict[str, PartRecord] | None:
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
