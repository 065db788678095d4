"""Benchmarks: ratios in one run, contenders interleaved, medians with their spread, and a last line of JSON.

``python jobs/benchmark.py throughput`` compares the engine at full depth with HuggingFace ``generate`` in static
batches on the same prompts, says where the engine's time goes, and what the Ray job adds to the bare engine. ``peers``
compares it with everything else that answers prompts here, and with what the machine allows. ``depth`` measures
forced exits, ``exits`` the speed of a router checkpoint, ``verified`` that of its drafts, ``quality`` what its exits
cost in agreement, ``prefix`` what prompts that begin alike save, ``serving`` the server under load,
``faults`` what killed processes cost a job, ``scale`` what a second actor brings and what a row costs the driver's
memory, ``analytics`` what queries and reports take; ``kernels`` measures the GPU kernels, and ``kernel-resources``
compiles them for every architecture without a GPU. Prefix caching is off but in ``prefix``, ``serving``, ``faults`` and
the memory of ``scale``: rounds repeat their prompts, and all compute them.
"""

from __future__ import annotations

import bench_commands_engine
import bench_commands_exits
import bench_commands_jobs
import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)
for part in (bench_commands_engine, bench_commands_exits, bench_commands_jobs):
    app.add_typer(part.app)


@app.callback()
def _root() -> None:
    """Benchmarks of tide_ray."""


if __name__ == "__main__":
    app()
