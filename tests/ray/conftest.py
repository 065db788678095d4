"""One local Ray per module (two CPUs, two fake GPUs), and a small job to run on it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.data import DataContext
from rich.console import Console

from tide_ray.data.job import run_generate
from tide_ray.data.job_config import GenerateJobConfig


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=200 * 2**20,
        )
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_no_progress_timeout_s = 90
        yield
        ray.shutdown()


class SmallJob:
    """A job of ``NUM_ROWS`` prompts and a tiny model, run as often as a test likes into one output folder."""

    NUM_ROWS = 30
    LIMITS = {"max_num_seqs": 8, "max_model_len": 128, "dtype": "float32", "device": "cpu"}  # noqa: RUF012

    def __init__(self, folder: Path, model: Path) -> None:
        self.model = model
        self.prompts = folder / "prompts.jsonl"
        self.out = folder / "out"
        self.write_prompts([self.row(i) for i in range(self.NUM_ROWS)])

    @staticmethod
    def row(i: int) -> dict[str, Any]:
        """The input row ``i``: a string or messages, and an answer length of its own."""
        text = f"row {i} " + "word " * (i % 5)
        row: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if i % 7 == 3 else {"prompt": text}
        return {**row, "label": f"label {i}", "sampling_params": {"max_tokens": 3 + i % 6}}

    def write_prompts(self, rows: list[dict[str, Any]], tail: str = "") -> None:
        self.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)

    def run(self, **settings: Any) -> tuple[int, str]:
        """The exit code and what was printed."""
        values: dict[str, Any] = {
            "model": str(self.model),
            "prompts": [str(self.prompts)],
            "output": str(self.out),
            "num_threads": 1,
            "batch_size": 4,
            "ignore_eos": True,
            **self.LIMITS,
            **settings,
        }
        printed = io.StringIO()
        code = run_generate(GenerateJobConfig.build(values), Console(file=printed, width=200))
        return code, printed.getvalue()

    def rows(self, folder: str) -> list[dict[str, Any]]:
        """All rows of ``data``, ``errors`` or ``_input``."""
        parts = [pq.read_table(path) for path in sorted((self.out / folder).glob("*.parquet"))]
        return pa.concat_tables(parts).to_pylist()

    def ids(self, folder: str) -> list[str]:
        return [row["row_id"] for row in self.rows(folder)]

    def facts(self) -> dict[str, Any]:
        return json.loads((self.out / "run.json").read_text())


@pytest.fixture
def job(tmp_path: Path, tiny_llama_folder: Path) -> SmallJob:
    return SmallJob(tmp_path, tiny_llama_folder)
