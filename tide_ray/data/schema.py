"""The Arrow schemas of what a job writes: result rows, error rows, and the run facts in the files' metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from tide_ray.data.job_config import GenerateJobConfig

SCHEMA_VERSION = "3"
METADATA_PREFIX = "tide_ray."
ERROR_COLUMN = "__inference_error__"
KEPT_PREFIX = "kept__"
"""Input columns that the user keeps travel under this prefix, so that they cannot meet a column of ours."""


def _plain_list(item: pa.DataType) -> pa.DataType:
    # Items are declared not null: readers then see SMALLINT[] and friends, not an extension type or a nullable int64.
    return pa.list_(pa.field("element", item, nullable=False))


TOKEN_IDS = _plain_list(pa.int32())
DEPTHS = _plain_list(pa.int16())
TIMES = _plain_list(pa.int32())
SCORES = _plain_list(pa.float32())
GATE_SCORES_COLUMN = "gate_scores"
DRAFT_COLUMNS = ("num_accepted_drafts", "num_rejected_drafts")
SHADOW_LOSS_COLUMN, EXITS_ON_COLUMN = "shadow_loss", "exits_on"
OPTIONAL_SCHEMA = pa.schema(
    [
        (GATE_SCORES_COLUMN, SCORES),
        *((name, pa.int32()) for name in DRAFT_COLUMNS),
        (SHADOW_LOSS_COLUMN, pa.float32()),
        (EXITS_ON_COLUMN, pa.bool_()),
    ]
)
"""Columns that are there when asked for. ``gate_scores``: of every token the score at the last boundary that asked it,
NaN where none did. In mode ``verified``: how many tokens drafted at a boundary full depth confirmed, and how many not.
With a drift guard: the loss of a row that was shadowed, else null, and whether exits were still on when it was done.
"""


def optional_columns(config: GenerateJobConfig) -> tuple[str, ...]:
    """Names of the columns that a job's output has beside those it always has."""
    return (
        *((GATE_SCORES_COLUMN,) if config.gate_scores else ()),
        *(DRAFT_COLUMNS if config.mode == "verified" else ()),
        *((SHADOW_LOSS_COLUMN, EXITS_ON_COLUMN) if config.shadow is not None else ()),
    )


OUTPUT_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("prompt", pa.string()),
        ("generated_text", pa.string()),
        ("generated_tokens", TOKEN_IDS),
        ("exit_layers", DEPTHS),
        ("token_times_us", TIMES),
        ("num_input_tokens", pa.int32()),
        ("num_generated_tokens", pa.int32()),
        ("mean_exit_layer", pa.float32()),
        ("finish_reason", pa.string()),
        ("queue_time_us", pa.int64()),
        ("total_time_us", pa.int64()),
        ("finished_at", pa.timestamp("us")),
    ]
)
"""One row per prompt. The three lists have equal length; ``exit_layers`` holds depths, times are microseconds, and
``finished_at`` is UTC by the clock of the node that answered."""

ATTEMPTS_COLUMN = "attempts"
ERROR_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("stage", pa.string()),
        ("error", pa.string()),
        (ATTEMPTS_COLUMN, pa.int32()),
        ("input", pa.string()),
    ]
)
"""One row per prompt that got no result.

``stage`` is ``input`` (never reached an engine), ``generate`` (the engine refused it) or ``process`` (its process died
of it); ``attempts`` counts how often it was tried; ``input`` is the prompt's text, or JSON of messages or token ids.
"""

ADDED_IN = {ATTEMPTS_COLUMN: 2, "finished_at": 3}
"""The schema version that a column came with; 1 for those that are not here. Columns are added and never change."""


def as_of(schema: pa.Schema, version: str) -> pa.Schema:
    """The columns that files of a schema version have of ``schema``."""
    return pa.schema([column for column in schema if ADDED_IN.get(column.name, 1) <= int(version)])


def with_metadata(schema: pa.Schema, facts: Mapping[str, Any]) -> pa.Schema:
    """The schema with run facts in its metadata, one ``tide_ray.<name>`` entry each: strings as they are, else JSON."""
    entries = {"schema_version": SCHEMA_VERSION, **facts}
    encoded = {
        METADATA_PREFIX + name: value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        for name, value in entries.items()
        if value is not None
    }
    return schema.with_metadata(encoded)
