"""A small job to run on the Ray that files share."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tide_ray.data.job import run_generate
from tide_ray.data.job_config import GenerateJobConfig


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
