"""The SQL of the views ``rows``, ``tokens``, ``errors`` and ``run`` over the outputs of jobs.

Every view has the same columns whatever schema version its files have: what they lack is NULL. Columns that a job
kept from its input follow.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from tide_ray.analytics.outputs import JobOutput
from tide_ray.data.schema import ERROR_SCHEMA, OPTIONAL_SCHEMA, OUTPUT_SCHEMA
from tide_ray.data.storage import StoragePath

RUN_COLUMN = "run"
"""The name of the output that a row is from, in every view."""
NO_ROWS, NO_ERRORS, RUN_FACTS, VOCABULARY = "_no_rows", "_no_errors", "_run_facts", "_vocabulary"
"""Tables behind the views: the columns of ``rows`` and ``errors``, the facts of the runs, and token texts."""

_RUN = pa.field(RUN_COLUMN, pa.string())
ROWS_SCHEMA = pa.schema([_RUN, *OUTPUT_SCHEMA, *OPTIONAL_SCHEMA])
ERRORS_SCHEMA = pa.schema([_RUN, *ERROR_SCHEMA])
RUN_SCHEMA = pa.schema(
    [
        _RUN,
        ("path", pa.string()),
        ("is_finished", pa.bool_()),
        ("model", pa.string()),
        ("revision", pa.string()),
        ("policy", pa.string()),
        ("mode", pa.string()),
        ("dtype", pa.string()),
        ("device", pa.string()),
        ("num_layers", pa.int32()),
        ("boundaries", pa.list_(pa.int32())),
        ("kv_policy", pa.string()),
        ("num_actors", pa.int32()),
        ("max_num_seqs", pa.int32()),
        ("rows", pa.int64()),
        ("errors", pa.int64()),
        ("tokens", pa.int64()),
        ("mean_depth", pa.float64()),
        ("tokens_per_second", pa.float64()),
        ("generation_seconds", pa.float64()),
        ("started", pa.string()),
        ("finished", pa.string()),
        ("tide_ray_version", pa.string()),
        ("schema_version", pa.string()),
        ("facts", pa.string()),
    ]
)
"""``facts`` is the JSON of everything that is known of the run; the rest is taken from it."""
OF_THE_ENGINE = ("revision", "policy", "mode", "dtype", "device", "num_layers", "max_num_seqs")


def run_table(outputs: Sequence[JobOutput]) -> pa.Table:
    """One row per output."""
    return pa.Table.from_pylist([_run_row(output) for output in outputs], schema=RUN_SCHEMA)


def _run_row(output: JobOutput) -> dict[str, Any]:
    facts = output.facts
    engine = facts.get("engine") or {}
    exits = engine.get("exits")
    exits = exits if isinstance(exits, dict) else {}
    known = {
        **facts,
        **{name: engine.get(name, facts.get(name)) for name in OF_THE_ENGINE},
        "boundaries": exits.get("boundaries"),
        "kv_policy": exits.get("kv_policy"),
        RUN_COLUMN: output.name,
        "path": output.path,
        "is_finished": output.is_finished,
        "facts": json.dumps(facts),
    }
    return {column.name: _as_type(known.get(column.name), column.type) for column in RUN_SCHEMA}


def _as_type(value: Any, kind: pa.DataType) -> Any:
    return str(value) if value is not None and pa.types.is_string(kind) else value


def rows_view(outputs: Sequence[JobOutput]) -> str:
    return _view("rows", NO_ROWS, [(output.name, output.data) for output in outputs])


def errors_view(outputs: Sequence[JobOutput]) -> str:
    return _view("errors", NO_ERRORS, [(output.name, output.errors) for output in outputs])


def _view(name: str, columns: str, sources: Sequence[tuple[str, Sequence[StoragePath]]]) -> str:
    """A view of the columns of an empty table, filled by name from part files."""
    selects = [f"SELECT * FROM {columns}"]
    selects += [f"SELECT {literal(run)} AS {RUN_COLUMN}, * FROM {parquet(files)}" for run, files in sources if files]
    return f"CREATE VIEW {name} AS {' UNION ALL BY NAME '.join(selects)}"


def run_view() -> str:
    return f"CREATE VIEW run AS SELECT * FROM {RUN_FACTS}"


def tokens_view(groups: Sequence[Sequence[str]]) -> str:
    """One row per generated token, lists unnested as they are read.

    Args:
        groups: names of runs, those that share a vocabulary together; number n has table ``_vocabulary_n``.
    """
    selects = []
    for number, names in enumerate(groups):
        where = f"WHERE {RUN_COLUMN} IN ({', '.join(map(literal, names))})" if len(groups) > 1 else ""
        selects.append(
            f"SELECT {RUN_COLUMN}, row_id, position, token_id, token, token_class, depth, time_us FROM ("
            f"SELECT {RUN_COLUMN}, row_id, unnest(range(len(generated_tokens)))::INTEGER AS position, "
            "unnest(generated_tokens) AS token_id, unnest(exit_layers) AS depth, unnest(token_times_us) AS time_us "
            f"FROM rows {where}) LEFT JOIN {VOCABULARY}_{number} USING (token_id)"
        )
    return f"CREATE VIEW tokens AS {' UNION ALL '.join(selects)}"


def parquet(files: Sequence[StoragePath]) -> str:
    """The part files as one relation. Folders named NAME=VALUE above them are no columns."""
    names = ", ".join(literal(pattern(file)) for file in files)
    return f"read_parquet([{names}], union_by_name = true, hive_partitioning = false)"


def pattern(file: StoragePath) -> str:
    """What DuckDB finds ``file`` by: a glob that matches nothing else, on an object store its URL (``ObjectFiles``)."""
    return glob.escape(str(file)) if isinstance(file, Path) else str(file)


def literal(text: str) -> str:
    """``text`` as an SQL string."""
    return "'" + text.replace("'", "''") + "'"
