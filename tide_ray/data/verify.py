"""Whether an output folder holds what its job promised: every row once, every part as it was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tide_ray.data.adoption import late_parts
from tide_ray.data.compact import has_pending
from tide_ray.data.job_folder import JobFolder
from tide_ray.data.manifest import PartRecord, load_manifest, part_files
from tide_ray.data.object_path import UnavailableError
from tide_ray.data.parts import DATA_FOLDER, KINDS, is_intact, part_checksum
from tide_ray.data.reading import fetched
from tide_ray.data.schema import ERROR_SCHEMA, METADATA_PREFIX, OUTPUT_SCHEMA, as_of
from tide_ray.data.snapshot import read_rows
from tide_ray.data.storage import StoragePath, name_below
from tide_ray.messages import one_line

LIST_COLUMNS = ("generated_tokens", "exit_layers", "token_times_us")
IDS_TO_NAME = 3


@dataclass(slots=True)
class Verification:
    """Counts, and what is wrong in a line each. ``num_left`` rows of an unfinished job are not wrong."""

    is_finished: bool
    num_expected: int
    num_results: int = 0
    num_errors: int = 0
    num_parts: int = 0
    num_left: int = 0
    problems: list[str] = field(default_factory=list)


def verify_job(output: str | StoragePath) -> Verification:
    """Read every part of the job in ``output`` and compare it with checksums, manifest, schema and input snapshot.

    Raises:
        UserError: ``output`` holds no job, or one whose own records are damaged.
        UnavailableError: the object store stopped answering, which is no problem of the output.
    """
    folder = JobFolder.existing(output)
    job = folder.fields()
    expected = {row_id for table in read_rows(folder.input_folder) for row_id in table["row_id"].to_pylist()}
    counts = folder.finished()
    found = Verification(is_finished=counts is not None, num_expected=len(expected))
    manifest = load_manifest(folder.path)
    if len(expected) != job["input_rows"]:
        found.problems.append(f"_input: holds {len(expected)} rows of the job's {job['input_rows']}")
    if has_pending(folder.path):
        found.problems.append("compact was interrupted: run it again")
    if manifest is None and found.is_finished:
        found.problems.append("_manifest.json: missing from a finished job")
    for path in late_parts(folder.path, KINDS):
        found.problems.append(
            f"{name_below(folder.path, path)}: written by an attempt that was over; the job's command removes it"
        )
    seen: dict[str, str] = {}
    names = set()
    data_schema: pa.Schema | None = None
    for kind in KINDS:
        for path in part_files(folder.path, kind):
            name = name_below(folder.path, path)
            names.add(name)
            found.num_parts += 1
            table = _read_part(path, name, None if manifest is None else manifest.get(name), found.problems)
            if table is None:
                continue
            if manifest is not None and name not in manifest:
                found.problems.append(f"{name}: not in the manifest")
            if kind == DATA_FOLDER:
                data_schema = data_schema or table.schema.remove_metadata()
                found.num_results += table.num_rows
            else:
                found.num_errors += table.num_rows
            found.problems += _check_table(name, table, kind, data_schema, job)
            _check_ids(name, table, expected, seen, found.problems)
    for name in manifest or {}:
        if name not in names:
            found.problems.append(f"{name}: missing, it is in the manifest")
    missing = sorted(expected - seen.keys())
    found.num_left = len(missing)
    if missing and found.is_finished:
        found.problems.append(f"{len(missing)} rows missing from a finished job: {_some(missing)}")
    if counts is not None and (counts["rows"], counts["errors"]) != (found.num_results, found.num_errors):
        found.problems.append(
            f"_SUCCESS counts {counts['rows']} rows and {counts['errors']} errors, "
            f"the parts hold {found.num_results} and {found.num_errors}"
        )
    return found


def _read_part(path: StoragePath, name: str, record: PartRecord | None, problems: list[str]) -> pa.Table | None:
    """The part's rows; None, with the reason in ``problems``, when they are not those that were written."""
    try:
        with fetched(path) as file:
            metadata = pq.read_metadata(file)
            checksum = part_checksum(metadata)
            if checksum is None:
                problems.append(f"{name}: not written by a job, it has no checksum")
                return None
            if not is_intact(file, metadata):
                problems.append(f"{name}: its rows are not those that were written (checksum)")
                return None
            if record is not None and PartRecord(name, metadata.num_rows, file.stat().st_size, checksum) != record:
                problems.append(f"{name}: not the file that the manifest lists")
            return pq.read_table(file, partitioning=None)  # a folder NAME=VALUE above it is no column
    except UnavailableError:
        raise
    except (pa.ArrowException, OSError) as error:
        problems.append(f"{name}: cannot be read: {one_line(error, 200)}")
        return None


def _check_table(
    name: str, table: pa.Table, kind: str, data_schema: pa.Schema | None, job: Mapping[str, Any]
) -> list[str]:
    problems = []
    schema = table.schema.remove_metadata()
    wanted = as_of(OUTPUT_SCHEMA if kind == DATA_FOLDER else ERROR_SCHEMA, job["schema_version"])
    if pa.schema(list(schema)[: len(wanted)]) != wanted or schema != (data_schema if kind == DATA_FOLDER else wanted):
        return [f"{name}: its schema is not the job's"]
    source = (table.schema.metadata or {}).get((METADATA_PREFIX + "input_sha256").encode())
    if source is not None and source.decode() != job.get("input_sha256"):
        problems.append(f"{name}: belongs to a job with other input")
    if kind == DATA_FOLDER:
        for column in LIST_COLUMNS:
            lengths = pc.list_value_length(table[column]).cast(pa.int32())
            if not pc.all(pc.equal(lengths, table["num_generated_tokens"])).as_py():
                problems.append(f"{name}: {column} does not have num_generated_tokens values in every row")
    return problems


def _check_ids(name: str, table: pa.Table, expected: set[str], seen: dict[str, str], problems: list[str]) -> None:
    doubled: dict[str, list[str]] = {}
    foreign = []
    for row_id in table["row_id"].to_pylist():
        if row_id in seen:
            doubled.setdefault(seen[row_id], []).append(row_id)
        elif row_id in expected:
            seen[row_id] = name
        else:
            foreign.append(row_id)
    for other, ids in doubled.items():
        place = "twice in itself" if other == name else f"also in {other}"
        problems.append(f"{name}: {len(ids)} rows are {place}: {_some(ids)}")
    if foreign:
        problems.append(f"{name}: {len(foreign)} rows are not in the input: {_some(foreign)}")


def _some(ids: list[str]) -> str:
    return ", ".join(ids[:IDS_TO_NAME]) + (", ..." if len(ids) > IDS_TO_NAME else "")
