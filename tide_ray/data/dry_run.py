"""``--dry-run``: what a job would take, without writing anything.

One actor's engine answers a few of the job's rows, evenly spread over its input, in the place that the job's actors
would have. Rows left and answer lengths are taken to be like those, and all actors like the probe's; starting Ray and
loading the model are not counted.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from tide_ray.data.cluster import connected, quiet_ray
from tide_ray.data.generation import default_rows_per_part, generator_options, processor_config, rows_per_batch
from tide_ray.data.identity import model_identity
from tide_ray.data.job_config import GenerateJobConfig
from tide_ray.data.schema import ERROR_COLUMN
from tide_ray.data.snapshot import read_rows, write_snapshot
from tide_ray.messages import one_line
from tide_ray.types import JobError, UserError

if TYPE_CHECKING:
    from tide_ray.config import EngineConfig
    from tide_ray.data.actor import GeneratorOptions

MOST_PROBE_ROWS = 64


def run_dry(config: GenerateJobConfig, console: Console) -> int:
    """Probe the job and print its plan. Returns exit code 0.

    Raises:
        UserError: as the job itself would, for what can be known before it writes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "input"
        snapshot = write_snapshot(config, folder)
        model_identity(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
        sample = _evenly_spread(folder, snapshot.num_rows - snapshot.num_bad_rows)
    with connected(config.address, is_verbose=config.verbose), quiet_ray(is_verbose=config.verbose):
        probe = _probe_in_place(config, sample) if sample.num_rows else None
    batch_size = rows_per_batch(config, snapshot.num_rows)
    rows_per_part = config.rows_per_part or default_rows_per_part(snapshot.num_rows, batch_size)
    table = Table(show_header=False, title="tide-ray generate --dry-run", title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("rows", f"{snapshot.num_rows:,}, {snapshot.num_bad_rows:,} of them unusable")
    table.add_row("blocks", f"{-(-snapshot.num_rows // batch_size):,} of {batch_size} rows")
    table.add_row("parts", f"about {-(-snapshot.num_rows // rows_per_part):,}")
    if probe is not None:
        for name, text in _estimates(config, probe, snapshot.num_rows - snapshot.num_bad_rows):
            table.add_row(name, text)
    console.print(table)
    return 0


def _evenly_spread(folder: Path, num_rows: int) -> pa.Table:
    """At most MOST_PROBE_ROWS usable rows of a snapshot with ``num_rows`` of them."""
    step = max(1, -(-num_rows // MOST_PROBE_ROWS))
    kept, seen = [], 0
    for table in read_rows(folder):
        usable = table.filter(pc.equal(table["error"], ""))
        kept.append(usable.take(pa.array(range(-seen % step, usable.num_rows, step), pa.int64())))
        seen += usable.num_rows
    return pa.concat_tables(kept)


def _probe_in_place(config: GenerateJobConfig, sample: pa.Table) -> dict[str, Any]:
    import ray

    from tide_ray.data.processor import Processor

    processor = Processor(processor_config(config, batch_size=rows_per_batch(config, sample.num_rows)))
    placement = processor.placed()
    options = replace(generator_options(config), placement=placement)
    task = ray.remote(max_retries=0, **processor.ray_options(placement))(_probe)
    try:
        probe = ray.get(task.remote(config.model, config.engine_config(), options, sample))
        return {**probe, "max_actors": placement.max_actors}
    except ray.exceptions.RayTaskError as error:
        kind = UserError if isinstance(error.cause, UserError) else JobError
        raise kind(f"the probe failed: {one_line(error.cause)}") from None
    except ray.exceptions.RayError as error:
        raise JobError(f"the probe's process died: {one_line(error, 500)}") from None


def _probe(model: str, engine_config: EngineConfig, options: GeneratorOptions, sample: pa.Table) -> dict[str, Any]:
    from tide_ray.data.actor import Generator
    from tide_ray.engine.kv_cache import page_bytes
    from tide_ray.engine.memory import peak_memory

    generator = Generator(model, engine_config, options)
    engine = generator.engine

    async def answer() -> pa.Table:
        return pa.concat_tables([table async for table in generator(sample)])

    start = time.perf_counter()
    answers = asyncio.run(answer())
    seconds = time.perf_counter() - start
    adapter = engine.runner.adapter
    page = page_bytes(adapter.kv_shapes, engine.config.page_size, adapter.dtype)
    return {
        "seconds": seconds,
        "rows": answers.num_rows,
        "rejected": pc.sum(pc.not_equal(answers[ERROR_COLUMN], "")).as_py(),
        "input_tokens": pc.sum(answers["num_input_tokens"]).as_py(),
        "answer_tokens": pc.sum(answers["num_generated_tokens"]).as_py(),
        "max_num_seqs": engine.max_num_seqs,
        "max_model_len": engine.max_model_len,
        "kv_bytes": engine.num_kv_pages * page,
        "device": str(engine.model.device),
        **peak_memory(engine.model.device),
    }


def _estimates(config: GenerateJobConfig, probe: dict[str, Any], num_rows: int) -> list[tuple[str, str]]:
    share = num_rows / probe["rows"]
    hours = probe["seconds"] * share / 3600
    few, most = config.num_actors, probe["max_actors"]
    time_taken = f"about {_duration(hours / few)}"
    if most > few:
        time_taken += f", {_duration(hours / most)} once all {most} actors are there"
    lines = [
        ("rejected in the probe", f"{probe['rejected']} of {probe['rows']}"),
        ("prompt tokens", f"about {probe['input_tokens'] * share:,.0f}"),
        ("answer tokens", f"about {probe['answer_tokens'] * share:,.0f}"),
        ("actors", f"{few}{f' to {most}' if most > few else ''} on {probe['device']}"),
        ("resident sequences", f"{probe['max_num_seqs']} of {probe['max_model_len']:,} tokens at most"),
        ("K/V memory of an actor", f"{probe['kv_bytes'] / 2**20:,.0f} MiB"),
        ("peak memory of the probe", f"{probe['peak_rss_bytes'] / 2**20:,.0f} MiB"),
        ("expected time", time_taken),
    ]
    if "peak_device_bytes" in probe:
        lines.insert(-1, ("on the device", f"{probe['peak_device_bytes'] / 2**20:,.0f} MiB"))
    if config.hourly_cost is not None:  # the same for any number of actors
        lines.append(("expected cost", f"about {hours * config.hourly_cost:,.2f}"))
    return lines


def _duration(hours: float) -> str:
    seconds = round(hours * 3600)
    return f"{seconds} s" if seconds < 120 else f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.1f} h"
