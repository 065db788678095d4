"""Outputs of jobs for analyses, written with the job's own writer and schema, without Ray and without an engine."""

from __future__ import annotations

import json
import random
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from tide_ray.data.parts import write_part
from tide_ray.data.schema import ERROR_SCHEMA, OUTPUT_SCHEMA, SCHEMA_VERSION, as_of
from tide_ray.engine.cost_model import CostCurve, EngineCosts
from tiny_models import TOKENIZER_VOCAB_SIZE

NUM_LAYERS = 4
DEPTHS, WEIGHTS = (2, 3, 4), (0.2, 0.3, 0.5)
START = datetime(2026, 11, 26, 12, 0, 0)

COSTS = EngineCosts(
    stages=tuple(CostCurve((1, 64), (w, w + 63 * c)) for w, c in ((1.0, 0.01), (0.5, 0.02), (0.5, 0.02))),
    gates=(CostCurve((1, 64), (0.01, 0.02)),) * 2,
    exits=(CostCurve((1, 64), (0.0, 0.0)),) * 2,
    head=CostCurve((1, 64), (0.2, 0.3)),
)
EXITS = {"boundaries": [2, 3], "mode": "exits", "kv_policy": "fitted", "holds": [1, 1], "certificate": None}


def run_facts(tokens: int, exits: dict[str, Any] | None = EXITS, rate: float = 110.0) -> dict[str, Any]:
    """Of a job of ``tokens`` tokens, as ``run.json`` has them; 300 steps of the first stage."""
    stages = [{"name": f"stage_{n}", "layers": layers, "depth": 0} for n, layers in enumerate(([0, 1], [2], [3]))]
    return {
        "engine": {
            "num_layers": NUM_LAYERS, "exits": exits, "stages": stages, "max_num_seqs": 64, "policy": "router",
            "costs": COSTS.to_json(), "dtype": "float32", "device": "cpu",
        },
        "counters": {
            "rows_through_layer": [3000, 3000, 2000, 1200],
            "launches": {"stage_0": 300, "stage_1": 300, "stage_2": 200},
            "num_prefill_exits": 0, "deferred_rows": {},
        },
        "generated_tokens": tokens,
        "final_exits": [exits] if exits else [],
        "num_actors": 1, "rows_before": 0, "tokens_per_second": rate, "generation_seconds": tokens / rate,
    }  # fmt: skip


def make_rows(num: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Answers of 1 to 40 random tokens; some tokens leave at depths 2 and 3, a first one never does."""
    chance = random.Random(seed)
    rows = []
    for number in range(num):
        length = chance.randint(1, 40)
        depths = [NUM_LAYERS, *chance.choices(DEPTHS, WEIGHTS, k=length - 1)]
        times = [chance.randint(2_000, 9_000), *(10 * depth + chance.randint(0, 30) for depth in depths[1:])]
        queue = chance.randint(0, 500)
        total = queue + sum(times)
        rows.append(
            {
                "row_id": f"row-{number:03d}",
                "prompt": f"prompt {number}",
                "generated_text": f"answer {number}",
                "generated_tokens": [chance.randrange(TOKENIZER_VOCAB_SIZE) for _ in depths],
                "exit_layers": depths,
                "token_times_us": times,
                "num_input_tokens": chance.randint(1, 300),
                "num_generated_tokens": length,
                "mean_exit_layer": sum(depths) / length,
                "finish_reason": chance.choice(["stop", "length"]),
                "queue_time_us": queue,
                "total_time_us": total,
                "finished_at": START + timedelta(microseconds=4_000 * number + total),
                "kind": chance.choice(["short", "long", None]),
            }
        )
    return rows


def write_output(
    folder: Path,
    rows: list[dict[str, Any]],
    *,
    model: str = "no such model",
    version: str = SCHEMA_VERSION,
    kept: tuple[str, ...] = (),
    errors: list[dict[str, Any]] | None = None,
    run: dict[str, Any] | None = None,
    rows_per_part: int = 16,
) -> Path:
    """A job's folder with these rows in parts; ``kept`` names string columns after the schema's. Returns the folder.

    Args:
        version: of the schema; columns that came later are not written.
        run: facts for ``run.json`` beside the model; None: the job is not finished.
    """
    scratch = folder / "_tmp"
    scratch.mkdir(parents=True)
    facts = {"schema_version": version, "input_rows": len(rows)}
    (folder / "_job.json").write_text(json.dumps(facts))
    schema = pa.schema([*as_of(OUTPUT_SCHEMA, version), *((name, pa.string()) for name in kept)])
    for first in range(0, len(rows), rows_per_part):
        table = pa.Table.from_pylist(rows[first : first + rows_per_part], schema=schema)
        write_part(scratch, folder / "data" / f"part-{first:04d}.parquet", [table], {**facts, "model": model})
    if errors:
        table = pa.Table.from_pylist(errors, schema=as_of(ERROR_SCHEMA, version))
        write_part(scratch, folder / "errors" / "part-0.parquet", [table], facts)
    if run is not None:
        (folder / "run.json").write_text(json.dumps({**facts, "model": model, **run}))
        (folder / "_SUCCESS").write_text("{}")
    return folder


def num_tokens(rows: list[dict[str, Any]]) -> int:
    return sum(row["num_generated_tokens"] for row in rows)


def expected_tokens(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """``row_id, position, token_id, depth, time_us`` of every token, in order."""
    return [
        (row["row_id"], position, *token)
        for row in rows
        for position, token in enumerate(
            zip(row["generated_tokens"], row["exit_layers"], row["token_times_us"], strict=True)
        )
    ]
