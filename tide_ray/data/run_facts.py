"""What identifies a job, what ran it, and the closing table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from platform import python_version
from typing import Any

from rich.console import Console
from rich.table import Table

from tide_ray.data.job_config import GenerateJobConfig
from tide_ray.data.prompts import non_default_params
from tide_ray.data.schema import SCHEMA_VERSION
from tide_ray.data.snapshot import Snapshot
from tide_ray.data.storage import StoragePath
from tide_ray.exits.checkpoint_files import routers_identity

REPORTED_PACKAGES = ("tide-ray", "torch", "transformers", "ray", "pyarrow")

EXIT_FIELDS = (
    "mode", "exit_threshold", "exit_error", "max_disagreement", "certified_loss", "exit_min_depth", "exits_when",
    "confidence_measure", "capacity", "kv_policy", "prefill_share", "prefill_tail",
)  # fmt: skip


def job_fields(config: GenerateJobConfig, model_identity: str, snapshot: Snapshot) -> dict[str, Any]:
    """The fields that must agree between attempts at one output folder: everything that changes an answer or a column.

    Where and how fast it runs (device, actors, batch sizes, threads, prefix caching) may differ. With prefill exits a
    shared prefix does reach the answers, as it keeps the choice made for the prompt that came first; but which one that
    is differs between any two attempts.
    """
    return {
        "model_identity": model_identity,
        "revision": config.revision,
        "dtype": config.dtype,
        "policy": config.engine_config().resolved_policy,
        "exits": routers_identity(config.exits) if config.exits else None,
        **{name: getattr(config, name) for name in EXIT_FIELDS},
        "gate_scores": config.gate_scores,
        "shadow": config.shadow,
        "exit_layer": config.exit_layer,
        "skip_layers": config.skip_layers,
        "static_cost": config.static_cost,
        "max_model_len": config.max_model_len,
        "sampling": non_default_params(config.sampling_params()),
        "raw": config.raw,
        "system_prompt": config.system_prompt,
        "keep_columns": config.keep_columns,
        "input_sha256": snapshot.sha256,
        "input_rows": snapshot.num_rows,
        "tide_ray_version": version("tide-ray"),
        "schema_version": SCHEMA_VERSION,
    }


def job_id(fields: Mapping[str, Any]) -> str:
    """What names a job in logs and metrics, from ``job_fields``: the same for every attempt at it."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def software_versions() -> dict[str, str]:
    return {"python": python_version(), **{name: version(name) for name in REPORTED_PACKAGES}}


def prefix_hit_rate(counters: Mapping[str, Any]) -> float:
    """Share of the prompts' tokens whose K/V came from the prefix cache, from the engines' summed counters."""
    num_prompt_tokens = counters.get("num_prompt_tokens", 0)
    return round(counters["num_cached_tokens"] / num_prompt_tokens, 4) if num_prompt_tokens else 0.0


def print_summary(console: Console, output: StoragePath, facts: Mapping[str, Any]) -> None:
    """The closing table. ``facts`` are those of ``run.json``."""
    table = Table(show_header=False, title="tide-ray generate", title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("rows", f"{facts['rows']:,}")
    table.add_row("errors", f"{facts['errors']:,}")
    table.add_row("tokens", f"{facts['tokens']:,}")
    if "tokens_per_second" in facts:
        table.add_row("tokens/s", f"{facts['tokens_per_second']:,.1f}")
    if facts["tokens"]:
        table.add_row("mean depth", f"{facts['mean_depth']:.2f}")
    tripped = [one for one in facts.get("drift", []) if one["tripped_after"] is not None]
    if tripped:
        table.add_row("exits stopped", f"drift in {len(tripped)} of {len(facts['drift'])} actors")
    if facts.get("prefix_hit_rate"):
        table.add_row("prompt from cache", f"{facts['prefix_hit_rate']:.1%}")
    table.add_row("output", str(output))
    console.print(table)
