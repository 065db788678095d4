"""How long analyses take and what they hold in memory, on made-up output in the job's own schema.

Answers have 1 to 199 tokens, 100 on average; token ids are Zipf's, 30 % of the tokens leave at one of two boundaries,
and times depend on the depth. Texts repeat, so that files are smaller than a job's of the same tokens. Every query, and
the report, runs in a process of its own; ``seconds`` start before the output is loaded, and the tokenizer's start
(torch, transformers) counts where token texts or classes are asked for. The peak is the process's VmHWM.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from bench_memory import peak_memory_bytes
from rich.console import Console
from rich.table import Table

from tide_ray.analytics import load
from tide_ray.analytics.export import whole_file, write_parquet
from tide_ray.analytics.report import make_report, print_report, write_report
from tide_ray.data import parts
from tide_ray.data.job_folder import JOB_FILE, RUN_FILE, SUCCESS_FILE
from tide_ray.data.schema import OUTPUT_SCHEMA, SCHEMA_VERSION, with_metadata

MEAN_TOKENS = 100
NUM_LAYERS = 30
DEPTHS, SHARES = (12, 24, NUM_LAYERS), (0.1, 0.2, 0.7)
VOCAB_SIZE = 49_152
RESIDENTS = 128
ROWS_PER_GROUP, ROWS_PER_FILE = 16_384, 262_144
SENTENCE = "An answer says what was asked for, and a little more than that. "

QUERIES = {
    "rows: mean depth by prompt length": """
        SELECT floor(log2(num_input_tokens)) AS length, avg(mean_exit_layer) AS depth FROM rows GROUP BY ALL""",
    "tokens: count and time by depth": "SELECT depth, count(*) AS n, avg(time_us) AS us FROM tokens GROUP BY depth",
    "tokens: texts that leave early most often": f"""
        SELECT token, count(*) AS n FROM tokens WHERE depth < {NUM_LAYERS} GROUP BY token ORDER BY n DESC LIMIT 10""",
    "tokens: the slowest of each answer, the 10 slowest": """
        SELECT row_id, max(time_us) AS us FROM tokens GROUP BY row_id ORDER BY us DESC LIMIT 10""",
}
EXPORT = "every token to Parquet"
EXPORT_QUERY = "SELECT row_id, position, token_id, depth, time_us FROM tokens"
REPORT = "report"


def run_analytics(token_counts: list[int], *, memory_limit: str, threads: int, model: str) -> dict[str, Any]:
    """Write output of each size, measure on it, and remove it; returns the facts that are printed and written."""
    sizes = []
    for num_tokens in token_counts:
        with tempfile.TemporaryDirectory(prefix="analytics") as scratch:
            start = time.perf_counter()
            facts = write_output(Path(scratch) / "out", num_tokens, model)
            facts["write_seconds"] = round(time.perf_counter() - start, 2)
            facts["measured"] = []
            for name in (*QUERIES, EXPORT, REPORT):
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
                    measured = alone.submit(_measure, name, scratch, memory_limit, threads).result()
                print({"tokens": num_tokens, **measured}, file=sys.stderr, flush=True)
                facts["measured"].append(measured)
        sizes.append(facts)
    return {"memory_limit": memory_limit, "model": model, "sizes": sizes}


def write_output(folder: Path, num_tokens: int, model: str) -> dict[str, Any]:
    """A finished job of about ``num_tokens`` tokens, a row group in memory at a time. Returns its size."""
    num_rows = max(num_tokens // MEAN_TOKENS, 1)
    fields = {"input_rows": num_rows, "schema_version": SCHEMA_VERSION}
    (folder / parts.DATA_FOLDER).mkdir(parents=True)
    schema = with_metadata(OUTPUT_SCHEMA, fields)
    generator = np.random.default_rng(0)
    written = 0

    def groups(first: int, last: int) -> Iterator[pa.Table]:
        nonlocal written
        for start in range(first, last, ROWS_PER_GROUP):
            table = _rows(generator, start, min(last, start + ROWS_PER_GROUP))
            written += table["num_generated_tokens"].to_numpy().sum()
            yield table

    for number, first in enumerate(range(0, num_rows, ROWS_PER_FILE)):
        file = folder / parts.DATA_FOLDER / f"part-made-up-{number:06d}.parquet"
        with file.open("wb") as stream:
            parts.write_parquet(stream, schema, groups(first, min(num_rows, first + ROWS_PER_FILE)))
    engine = {"num_layers": NUM_LAYERS, "max_num_seqs": RESIDENTS, "dtype": "bfloat16", "device": "cpu"}
    counts = {"rows": num_rows, "errors": 0, "tokens": int(written)}
    run = {**fields, "model": model, "engine": engine, "num_actors": 1, "rows_before": 0, **counts}
    for name, values in ((JOB_FILE, fields), (RUN_FILE, run), (SUCCESS_FILE, counts)):
        (folder / name).write_text(json.dumps(values) + "\n", encoding="utf-8")
    files = list((folder / parts.DATA_FOLDER).iterdir())
    size = sum(file.stat().st_size for file in files)
    return {"tokens": int(written), "rows": num_rows, "files": len(files), "bytes": size}


def _rows(generator: np.random.Generator, first: int, last: int) -> pa.Table:
    """Rows ``first`` to ``last - 1`` of a job whose residents take turns."""
    num = last - first
    lengths = generator.integers(1, 2 * MEAN_TOKENS, num)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    total = int(offsets[-1])
    depths = generator.choice(np.array(DEPTHS, np.int16), total, p=SHARES)
    depths[offsets[:-1]] = NUM_LAYERS  # an answer's first token comes from the prompt, which runs every layer
    times = (generator.gamma(8.0, 100.0, total) * depths).astype(np.int32)
    ids = np.minimum(generator.zipf(1.3, total), VOCAB_SIZE - 1).astype(np.int32)
    sums = np.add.reduceat(times.astype(np.int64), offsets[:-1])
    prompt_tokens = generator.integers(8, 512, num).astype(np.int32)
    ends = np.arange(first, last) * (MEAN_TOKENS * 22_000 // RESIDENTS) + sums
    columns = {
        "row_id": [f"row-{number:09d}" for number in range(first, last)],
        "prompt": [SENTENCE * (int(count) // 16 + 1) for count in prompt_tokens],
        "generated_text": [SENTENCE * (int(count) // 16 + 1) for count in lengths],
        "generated_tokens": _lists(offsets, ids, "generated_tokens"),
        "exit_layers": _lists(offsets, depths, "exit_layers"),
        "token_times_us": _lists(offsets, times, "token_times_us"),
        "num_input_tokens": prompt_tokens,
        "num_generated_tokens": lengths.astype(np.int32),
        "mean_exit_layer": (np.add.reduceat(depths.astype(np.int64), offsets[:-1]) / lengths).astype(np.float32),
        "finish_reason": np.where(lengths == 2 * MEAN_TOKENS - 1, "length", "stop"),
        "queue_time_us": np.zeros(num, np.int64),
        "total_time_us": sums,
        "finished_at": ends.astype("datetime64[us]"),
    }
    return pa.table([pa.array(columns[item.name], item.type) for item in OUTPUT_SCHEMA], schema=OUTPUT_SCHEMA)


def _lists(offsets: np.ndarray, values: np.ndarray, name: str) -> pa.Array:
    kind = OUTPUT_SCHEMA.field(name).type
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind.value_type), type=kind)


def _measure(name: str, scratch: str, memory_limit: str, threads: int) -> dict[str, Any]:
    """Run one analysis in this process."""
    start = time.perf_counter()
    with load(Path(scratch) / "out", memory_limit=memory_limit, threads=threads, spill_folder=scratch) as analytics:
        if name == REPORT:
            report = make_report(analytics)
            print_report(Console(file=io.StringIO()), report)
            write_report(Path(scratch) / "report.html", report)
            num_rows = sum(run["totals"]["num_rows"] for run in report.runs)
        elif name == EXPORT:
            with analytics.batches(EXPORT_QUERY) as reader, whole_file(f"{scratch}/tokens.parquet") as stream:
                write_parquet(reader, stream)
            num_rows = pa.parquet.read_metadata(f"{scratch}/tokens.parquet").num_rows
        else:
            num_rows = analytics.arrow(QUERIES[name]).num_rows
    return {
        "name": name,
        "seconds": round(time.perf_counter() - start, 2),
        "peak_rss_bytes": peak_memory_bytes(),
        "rows": num_rows,
    }


def print_analytics_report(facts: dict[str, Any]) -> None:
    """Print time and memory of every analysis by size."""
    table = Table(title=f"DuckDB with {facts['memory_limit']}", title_justify="left")
    table.add_column("analysis")
    for size in facts["sizes"]:
        table.add_column(f"{size['tokens']:,} tokens, s (peak MB)", justify="right")
    for lines in zip(*(size["measured"] for size in facts["sizes"]), strict=True):
        cells = [f"{one['seconds']:,.1f} ({one['peak_rss_bytes'] / 1e6:,.0f})" for one in lines]
        table.add_row(lines[0]["name"], *cells)
    Console(width=120).print(table)
