"""What a row gets from generation: the columns, for answered and for rejected rows alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from tide_ray.data.prompts import non_default_params
from tide_ray.data.schema import (
    DEPTHS,
    DRAFT_COLUMNS,
    ERROR_COLUMN,
    GATE_SCORES_COLUMN,
    OPTIONAL_SCHEMA,
    TIMES,
    TOKEN_IDS,
)
from tide_ray.types import RequestOutput, SamplingParams

RESULT_SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("prompt_token_ids", TOKEN_IDS),
        ("num_input_tokens", pa.int32()),
        ("generated_tokens", TOKEN_IDS),
        ("generated_text", pa.string()),
        ("num_generated_tokens", pa.int32()),
        ("exit_layers", DEPTHS),
        ("token_times_us", TIMES),
        ("mean_exit_layer", pa.float32()),
        ("finish_reason", pa.string()),
        ("queue_time_us", pa.int64()),
        ("total_time_us", pa.int64()),
        ("finished_at", pa.timestamp("us")),
        ("request_id", pa.string()),
        ("batch_uuid", pa.string()),
        ("time_taken_llm", pa.float64()),
        ("params", pa.string()),
        (ERROR_COLUMN, pa.string()),
    ]
)
"""Columns that every row gets, the same for rejected rows, beside the input's own columns."""


def finished_row(output: RequestOutput, params: SamplingParams, batch_uuid: str, seconds: float) -> dict[str, Any]:
    """The columns of a row that was answered."""
    completion = output.outputs[0]
    return {
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "num_input_tokens": len(output.prompt_token_ids),
        "generated_tokens": completion.token_ids,
        "generated_text": completion.text,
        "num_generated_tokens": len(completion.token_ids),
        "exit_layers": completion.exit_layers,
        GATE_SCORES_COLUMN: completion.gate_scores,
        **{name: getattr(completion, name) for name in DRAFT_COLUMNS},
        "token_times_us": completion.token_times_us,
        "mean_exit_layer": completion.mean_exit_layer,
        "finish_reason": completion.finish_reason,
        "queue_time_us": output.queue_time_us,
        "total_time_us": output.total_time_us,
        "finished_at": output.unix_time_us,
        "request_id": output.request_id,
        "batch_uuid": batch_uuid,
        "time_taken_llm": seconds,
        "params": json.dumps(non_default_params(params)),
        ERROR_COLUMN: "",
    }


def failed_row(row: dict[str, Any], error: str, batch_uuid: str) -> dict[str, Any]:
    """The columns of a row that was rejected; its prompt is the one given, JSON for token ids."""
    token_ids = row.get("prompt_token_ids")
    return {
        "prompt": given_prompt(row) if token_ids is None else json.dumps(token_ids, default=str),
        "prompt_token_ids": [],
        "num_input_tokens": 0,
        "generated_tokens": [],
        "generated_text": "",
        "num_generated_tokens": 0,
        "exit_layers": [],
        GATE_SCORES_COLUMN: [],
        **dict.fromkeys(DRAFT_COLUMNS, 0),
        "token_times_us": [],
        "mean_exit_layer": 0.0,
        "finish_reason": "error",
        "queue_time_us": 0,
        "total_time_us": 0,
        "finished_at": None,
        "request_id": "",
        "batch_uuid": batch_uuid,
        "time_taken_llm": -1.0,
        "params": "",
        ERROR_COLUMN: error,
    }


def given_prompt(row: dict[str, Any]) -> str | None:
    """The prompt as the input has it: the string, messages as JSON, None for token ids."""
    messages = row.get("messages")
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    return messages if messages is None or isinstance(messages, str) else json.dumps(messages, default=str)


def attach(batch: pa.Table, results: Sequence[dict[str, Any] | None], optional_columns: Sequence[str]) -> pa.Table:
    """``batch``'s columns, RESULT_SCHEMA's and these of OPTIONAL_SCHEMA; a row whose result is None is left out."""
    added = pa.schema([*RESULT_SCHEMA, *(OPTIONAL_SCHEMA.field(name) for name in optional_columns)])
    made = pa.Table.from_pylist([result for result in results if result is not None], schema=added)
    if made.num_rows < batch.num_rows:
        batch = batch.filter(pa.array([result is not None for result in results]))
    carried = [name for name in batch.column_names if name not in added.names]
    schema = pa.schema([*(batch.schema.field(name) for name in carried), *added])
    return pa.Table.from_arrays([*(batch[name] for name in carried), *made.columns], schema=schema)
