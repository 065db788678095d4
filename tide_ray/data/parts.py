"""Part files: complete from the moment they can be seen.

A part is written in a scratch folder of its attempt, fsynced and renamed into ``data/`` or ``errors/``. The file itself
is the commit record: a killed job leaves only whole parts behind. The next attempt removes the scratch folder before it
looks at what is committed, and only the job makes it, so a writer that outlived its job has nothing to rename. (For
object stores see ``storage`` and ``adoption``.)

A part carries the checksum of its own rows: the SHA-256 of all its bytes before the footer stands in the footer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tide_ray.data.ledger import DEATHS_BEFORE_GIVING_UP, REASON
from tide_ray.data.reading import for_arrow
from tide_ray.data.schema import (
    ATTEMPTS_COLUMN,
    ERROR_COLUMN,
    ERROR_SCHEMA,
    KEPT_PREFIX,
    METADATA_PREFIX,
    OPTIONAL_SCHEMA,
    OUTPUT_SCHEMA,
    with_metadata,
)
from tide_ray.data.storage import StoragePath, committing
from tide_ray.types import JobError

DATA_FOLDER = "data"
ERRORS_FOLDER = "errors"
KINDS = (DATA_FOLDER, ERRORS_FOLDER)

BODY_SHA256 = METADATA_PREFIX + "body_sha256"
BODY_BYTES = METADATA_PREFIX + "body_bytes"
HASHED_AT_A_TIME = 1 << 20


def output_table(block: pa.Table) -> pa.Table:
    """The successful rows of a processed block, in the output schema with optional and kept columns behind."""
    rows = block.filter(pc.equal(block[ERROR_COLUMN], ""))
    kept = [name for name in block.column_names if name.startswith(KEPT_PREFIX)]
    ours = [*OUTPUT_SCHEMA, *(field for field in OPTIONAL_SCHEMA if field.name in block.column_names)]
    columns = [rows[item.name].cast(item.type) for item in ours] + [rows[name] for name in kept]
    fields = [*ours, *(pa.field(name.removeprefix(KEPT_PREFIX), block[name].type) for name in kept)]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def error_table(block: pa.Table) -> pa.Table:
    """The rejected rows of a processed block, in the error schema."""
    rows = block.filter(pc.not_equal(block[ERROR_COLUMN], ""))
    killed = pc.equal(rows[ERROR_COLUMN], REASON)
    return make_error_table(
        rows["row_id"],
        rows[ERROR_COLUMN],
        rows["prompt"],
        stages=pc.if_else(killed, "process", "generate"),
        attempts=pc.add(rows[ATTEMPTS_COLUMN], pc.if_else(killed, DEATHS_BEFORE_GIVING_UP, 1)),
    )


def make_error_table(
    row_ids: pa.ChunkedArray,
    errors: pa.ChunkedArray,
    inputs: pa.ChunkedArray,
    *,
    stages: pa.ChunkedArray | None = None,
    attempts: pa.ChunkedArray | None = None,
) -> pa.Table:
    """An error table from columns of equal length; without ``stages`` and ``attempts`` they are ``input`` and 1."""
    count = len(row_ids)
    columns = {
        "row_id": row_ids,
        "stage": pa.array(["input"] * count, pa.string()) if stages is None else stages,
        "error": errors,
        "attempts": pa.array([1] * count, pa.int32()) if attempts is None else attempts,
        "input": inputs,
    }
    return pa.table([columns[item.name].cast(item.type) for item in ERROR_SCHEMA], schema=ERROR_SCHEMA)


def write_part(scratch: StoragePath, target: StoragePath, tables: Sequence[pa.Table], facts: Mapping[str, Any]) -> None:
    """Commit ``tables`` as the file ``target``, or nothing when they hold no rows.

    A task that runs again writes the same rows once more: in a shared folder they replace the part, on an object store
    the one that is there stays, so that no late writer can change a part that counts.

    Args:
        scratch: the attempt's; it must exist: it is not made here.

    Raises:
        JobError: the part that is there has other rows.
    """
    table = pa.concat_tables(tables).combine_chunks()
    if table.num_rows == 0:
        return
    try:
        with committing(scratch, target, is_new=True) as stream:
            write_parquet(stream, with_metadata(table.schema, facts), [table])
    except FileExistsError:
        there = pq.read_table(for_arrow(target), columns=["row_id"], partitioning=None)
        if not set(table["row_id"].to_pylist()) <= set(there["row_id"].to_pylist()):
            raise JobError(f"output: {str(target)!r} was written twice, with other rows") from None


def write_parquet(stream: BinaryIO, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write ``tables``, a row group each, with the file's checksum in its footer."""
    hashed = _HashedStream(stream)
    with pq.ParquetWriter(hashed, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table.cast(schema), row_group_size=max(table.num_rows, 1))
        writer.add_key_value_metadata({BODY_SHA256: hashed.digest.hexdigest(), BODY_BYTES: str(hashed.num_bytes)})


def part_checksum(metadata: pq.FileMetaData) -> str | None:
    """The checksum that a part says it has, None if it was not written by ``write_parquet``."""
    value = (metadata.metadata or {}).get(BODY_SHA256.encode())
    return None if value is None else value.decode()


def is_intact(path: Path, metadata: pq.FileMetaData) -> bool:
    """Whether the bytes of a part's rows are those that were written. ``metadata`` is the part's."""
    left = int((metadata.metadata or {}).get(BODY_BYTES.encode(), -1))
    digest = sha256()
    with path.open("rb") as stream:
        while left > 0 and (chunk := stream.read(min(left, HASHED_AT_A_TIME))):
            digest.update(chunk)
            left -= len(chunk)
    return left == 0 and digest.hexdigest() == part_checksum(metadata)


class _HashedStream:
    """A file to write to that knows the SHA-256 and the number of the bytes so far."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = sha256()
        self.num_bytes = 0

    @property
    def closed(self) -> bool:
        return self._stream.closed

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """Whoever opened the file closes it."""
        self._stream.flush()
