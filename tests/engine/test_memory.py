"""How many pages, residents and tokens an engine plans for the memory it finds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config

from references import assert_idle, loaded
from tide_ray import EngineConfig, SamplingParams, TideEngine, UserError
from tide_ray.engine import memory
from tide_ray.engine.kv_cache import KVCache, page_bytes
from tide_ray.engine.memory import (
    DEFAULT_MODEL_LEN,
    KNEE,
    MemoryPlan,
    container_room,
    free_memory,
    peak_memory,
    plan_memory,
)
from tide_ray.engine.preparation import position_limit
from tide_ray.models.adapter import Adapter, KVShape
from tiny_models import MAX_POSITIONS, build_tiny_model

PAGE = 2 * 2 * 16 * 32 * 4 * 4  # K and V x 2 heads x 16 wide x 32 tokens x 4 bytes x 4 layers


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return Adapter(build_tiny_model("llama"))


def plan(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch, *, free: int, limit: int = 4096, **values: Any
) -> MemoryPlan:
    monkeypatch.setattr(memory, "free_memory", lambda _device: free)
    return plan_memory(EngineConfig(**values), adapter, model_limit=limit)


# ---- pages ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_page_bytes_are_what_the_pools_take(dtype: torch.dtype) -> None:
    shapes = [KVShape(2, 16), KVShape(1, 32), KVShape(4, 8)]
    pools = KVCache(shapes, num_pages=5, page_size=8, dtype=dtype, device=torch.device("cpu"))
    taken = sum(pool.numel() * pool.element_size() for pool in (*pools.key_pools, *pools.value_pools))
    assert taken == 5 * page_bytes(shapes, 8, dtype)


def test_an_engines_pools_have_the_planned_pages(adapter: Adapter) -> None:
    config = EngineConfig(page_size=32, max_model_len=100, max_num_seqs=3)
    engine = TideEngine(loaded(build_tiny_model("llama")), config)
    assert engine.num_kv_pages == 3 * 4 == engine.scheduler.pool.num_pages
    assert len(engine.runner.pools.key_pools) == adapter.num_layers
    assert all(pool.shape == (12, 2, 32, 16) for pool in engine.runner.pools.key_pools)


def test_with_much_memory_every_resident_can_reach_max_model_len(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(adapter, monkeypatch, free=2**40, max_num_seqs=6, max_model_len=100)
    assert planned == MemoryPlan(num_pages=6 * 4, max_num_seqs=6, max_model_len=100)


def test_without_limits_residents_go_to_the_knee_and_lengths_to_the_models_limit(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    knee = KNEE["cpu"]
    assert plan(adapter, monkeypatch, free=2**40) == MemoryPlan(knee * 128, knee, 4096)
    long = plan(adapter, monkeypatch, free=2**40, limit=10**6)
    assert (long.max_model_len, long.max_num_seqs) == (DEFAULT_MODEL_LEN, knee)
    assert plan(adapter, monkeypatch, free=2**40, limit=10**6, max_model_len=10**6).max_model_len == 10**6


def test_little_memory_means_fewer_pages_not_fewer_tokens_per_sequence(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(adapter, monkeypatch, free=21 * PAGE, kv_memory_fraction=0.5, max_num_seqs=50, max_model_len=320)
    assert planned == MemoryPlan(num_pages=10, max_num_seqs=50, max_model_len=320)


def test_a_length_that_was_not_asked_for_gives_way_to_memory(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(adapter, monkeypatch, free=5 * PAGE, kv_memory_fraction=1.0)
    assert planned == MemoryPlan(num_pages=5, max_num_seqs=KNEE["cpu"], max_model_len=160)


def test_an_engine_with_memory_for_one_sequence_still_answers_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _device: 2 * PAGE)
    engine = TideEngine(loaded(build_tiny_model("llama")), EngineConfig(kv_memory_fraction=1.0))
    assert (engine.num_kv_pages, engine.max_model_len) == (2, 64)
    params = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
    outputs = engine.generate([[5, 6], [7] * 40, [8] * 63, [9] * 64], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [62, 24, 1, 0]
    assert outputs[3].error == "prompt must have at most 63 tokens (max_model_len 64), got 64"
    assert_idle(engine)


def test_a_length_that_was_asked_for_and_does_not_fit_is_refused(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as caught:
        plan(adapter, monkeypatch, free=64 * PAGE, max_model_len=2048)
    assert str(caught.value) == (
        "max_model_len: 2048 tokens need 2 MiB of K/V, got 1 MiB free (kv_memory_fraction 0.5)"
    )


def test_no_memory_at_all_is_refused(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"got 0 MiB free \(kv_memory_fraction 0.5\)"):
        plan(adapter, monkeypatch, free=PAGE)


# ---- the model's positions ----


def test_a_length_above_the_models_positions_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        TideEngine(loaded(build_tiny_model("llama")), EngineConfig(max_model_len=MAX_POSITIONS + 1))
    assert str(caught.value) == "max_model_len must be at most the model's limit of 256 tokens, got 257"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt_neox", "falcon", "gemma3_text", "phi3"])
def test_every_architecture_tells_its_positions(architecture: str) -> None:
    assert position_limit(build_tiny_model(architecture).config) == MAX_POSITIONS


def rope(**values: Any) -> dict[str, Any]:
    return {"rope_theta": 10000.0, **values}


@pytest.mark.parametrize(
    ("parameters", "limit"),
    [
        (rope(rope_type="default"), 1024),
        (rope(rope_type="linear", factor=4.0), 1024),
        (rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=256), 1024),
        (rope(rope_type="dynamic", factor=4.0, original_max_position_embeddings=256), 256),
        (rope(rope_type="dynamic", factor=4.0), 1024),
    ],
    ids=["default", "linear", "yarn", "dynamic", "dynamic without an original length"],
)
def test_dynamic_rotary_scaling_keeps_to_the_unscaled_length(parameters: dict[str, Any], limit: int) -> None:
    config = LlamaConfig(max_position_embeddings=1024, rope_parameters=parameters)
    assert position_limit(config) == limit


def test_long_context_rotary_scaling_keeps_to_the_unscaled_length() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config = Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=1024,
        original_max_position_embeddings=256,
        rope_parameters=rope(rope_type="longrope", **factors),
        pad_token_id=0,
    )
    assert position_limit(config) == 256


def test_a_model_with_dynamic_rotary_scaling_answers_to_its_unscaled_length() -> None:
    parameters = rope(rope_type="dynamic", factor=4.0, original_max_position_embeddings=64)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters=parameters,
    )
    engine = TideEngine(loaded(LlamaForCausalLM(config).eval()), EngineConfig(max_num_seqs=2))
    assert engine.max_model_len == 64
    assert engine.generate([[5] * 64])[0].error == "prompt must have at most 63 tokens (max_model_len 64), got 64"


# ---- free memory ----


def test_free_memory_of_this_machine_is_positive_and_below_its_total() -> None:
    total = int(Path("/proc/meminfo").read_text(encoding="ascii").split()[1]) * 1024
    assert 0 < free_memory(torch.device("cpu")) < total


def control_group(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, encoding="ascii")
    return root


def test_a_containers_limit_bounds_free_memory_and_droppable_cache_counts_as_free(tmp_path: Path) -> None:
    """Reading 6 GB of weights fills the file cache; that once looked like 6 GB of memory in use."""
    files = {
        "memory.max": "8000\n",
        "memory.current": "7000\n",
        "memory.stat": "anon 900\nfile 6100\nactive_file 100\ninactive_file 6000\n",
    }
    assert container_room(control_group(tmp_path, files)) == 7000


def test_a_container_of_the_first_control_groups_is_read_too(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": "8000\n",
        "memory/memory.usage_in_bytes": "7000\n",
        "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n",
    }
    assert container_room(control_group(tmp_path, files)) == 1500


def test_a_container_over_its_limit_has_no_room(tmp_path: Path) -> None:
    files = {"memory.max": "100", "memory.current": "150", "memory.stat": "inactive_file 20\n"}
    assert container_room(control_group(tmp_path, files)) == 0


def test_without_a_limit_there_is_no_bound(tmp_path: Path) -> None:
    assert container_room(tmp_path) is None
    assert container_room(control_group(tmp_path, {"memory.max": "max\n"})) is None


def test_memory_does_not_grow_over_a_long_run(make_engine: Callable[..., TideEngine]) -> None:
    engine = make_engine(max_num_seqs=8)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

    def resident_bytes() -> int:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def answer(rounds: range) -> None:
        for number in rounds:
            engine.generate([[number % 200 + 3, row + 3, *range(3, 40)] for row in range(8)], params)

    answer(range(15))
    before = resident_bytes()
    answer(range(15, 60))
    assert resident_bytes() - before < 4 << 20
    assert peak_memory(torch.device("cpu"))["peak_rss_bytes"] > 0.9 * before
