"""Engines that the tests of one file share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from references import GREEDY, NUM_PROMPTS, cycle_model, greedy, loaded, ragged_prompts
from tide_ray import EngineConfig, TideEngine
from tide_ray.engine import memory
from tide_ray.engine.kv_cache import page_bytes
from tiny_models import TOKENIZER_VOCAB_SIZE, build_tiny_model, tiny_tokenizer

PAGE_SIZE = 4
MAX_MODEL_LEN = 96


def tiny_config(**changes: object) -> EngineConfig:
    values = {
        "dtype": "float32",
        "device": "cpu",
        "page_size": PAGE_SIZE,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 4,
    }
    return EngineConfig(**{**values, **changes})


@pytest.fixture(scope="session")
def make_engine(tiny_llama_folder: Path) -> Callable[..., TideEngine]:
    """Makes an engine of the tiny llama; keyword arguments change its configuration."""
    return lambda **changes: TideEngine.from_pretrained(str(tiny_llama_folder), tiny_config(**changes))


@pytest.fixture(scope="module")
def engine(make_engine: Callable[..., TideEngine]) -> TideEngine:
    """The tiny llama with four residents, shared by the tests of a file."""
    return make_engine()


@pytest.fixture
def make_starved_engine(
    make_engine: Callable[..., TideEngine], engine: TideEngine, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., TideEngine]:
    """Makes an engine on a machine with memory for ``num_pages`` K/V pages only."""
    adapter = engine.runner.adapter
    per_page = page_bytes(adapter.kv_shapes, PAGE_SIZE, adapter.dtype)

    def make(num_pages: int, **changes: object) -> TideEngine:
        monkeypatch.setattr(memory, "free_memory", lambda _device: num_pages * per_page)
        return make_engine(kv_memory_fraction=1.0, **changes)

    return make


@pytest.fixture(scope="session")
def make_cycle_engine() -> Callable[..., TideEngine]:
    """Makes an engine of the model that follows ``references.CYCLE``."""
    return lambda **changes: TideEngine(loaded(cycle_model(), tiny_tokenizer()), tiny_config(**changes))


@pytest.fixture(scope="module")
def cycle_engine(make_cycle_engine: Callable[..., TideEngine]) -> TideEngine:
    return make_cycle_engine()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return ragged_prompts(NUM_PROMPTS, TOKENIZER_VOCAB_SIZE)


@pytest.fixture(scope="module")
def answers(prompts: list[list[int]]) -> list[list[int]]:
    """The greedy answer to each prompt, by the model's own forward."""
    model = build_tiny_model("llama", vocab_size=TOKENIZER_VOCAB_SIZE)
    return [greedy(model, prompt, GREEDY.max_tokens) for prompt in prompts]
