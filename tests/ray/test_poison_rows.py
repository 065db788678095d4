"""A row that kills its process costs that row and nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray

from tide_ray.config import EngineConfig
from tide_ray.data.actor import Generator, GeneratorOptions
from tide_ray.data.ledger import REASON
from tide_ray.data.processor import Processor, TideProcessorConfig
from tide_ray.data.schema import ERROR_COLUMN
from tide_ray.engine.engine import TideEngine
from tide_ray.types import Prompt, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("ray_cluster")]

ENGINE = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8, "max_model_len": 128, "num_threads": 1}


class FragileEngine(TideEngine):
    """Dies of one prompt like a process that the kernel kills."""

    def add_request(self, request_id: str, prompt: Prompt, params: SamplingParams, **options: Any) -> None:
        if prompt == "poison":
            os._exit(1)
        super().add_request(request_id, prompt, params, **options)


class FragileGenerator(Generator):
    def _make_engine(self, model: str, config: EngineConfig) -> TideEngine:
        return FragileEngine.from_pretrained(model, config)


def test_a_row_that_kills_the_process_is_given_up_after_three_deaths(tiny_llama_folder: Path, tmp_path: Path) -> None:
    items = [{"row_id": f"r{i}", "prompt": "poison" if i == 5 else f"fine {i}"} for i in range(8)]
    options = GeneratorOptions(continues_on_error=True, ledger_folder=str(tmp_path / "running"))
    config = TideProcessorConfig(
        model_source=str(tiny_llama_folder),
        engine_kwargs={**ENGINE, "selfcheck": False},
        batch_size=4,
        num_cpus_per_actor=0,
    )
    processor = Processor(config, options=options, generator=FragileGenerator)
    rows = processor(ray.data.from_items(items)).take_all()
    assert {row["row_id"]: row[ERROR_COLUMN] for row in rows} == {f"r{i}": REASON if i == 5 else "" for i in range(8)}
