"""The floor under everything: greedy output equals HuggingFace ``generate``, token for token, in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench_hf import static_batches
from transformers import PreTrainedModel

import tide_ray.data
from tide_ray import EngineConfig, SamplingParams, TideEngine
from tide_ray.models import load
from tiny_models import TINY_ARCHITECTURES, save_tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=24)


def hf_greedy(model: PreTrainedModel, prompt: list[int], max_tokens: int, **options: object) -> list[int]:
    """HF ``generate`` for one prompt alone: the answer's ids, EOS included."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            **options,
        )
    return output[0, len(prompt) :].tolist()


def ragged_prompts(num: int, vocab_size: int, longest: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, longest, (num,), generator=generator).tolist()
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module", params=TINY_ARCHITECTURES)
def architecture_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def hf_answers(architecture_folder: Path) -> list[list[int]]:
    model = load(str(architecture_folder), dtype="float32", device="cpu").model
    prompts = ragged_prompts(12, model.config.vocab_size)
    return [hf_greedy(model, prompt, GREEDY.max_tokens) for prompt in prompts]


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param({"max_num_seqs": 12}, id="all resident"),
        pytest.param({"max_num_seqs": 3}, id="refill"),
        pytest.param({"max_num_seqs": 5, "max_num_batched_tokens": 7}, id="chunked prefill"),
        pytest.param({"max_num_seqs": 1}, id="alone"),
    ],
)
def test_greedy_equals_hf_generate(
    architecture_folder: Path, hf_answers: list[list[int]], limits: dict[str, int]
) -> None:
    config = EngineConfig(dtype="float32", device="cpu", page_size=4, max_model_len=96, **limits)
    engine = TideEngine.from_pretrained(str(architecture_folder), config)
    prompts = ragged_prompts(12, engine.runner.adapter.config.vocab_size)
    outputs = engine.generate(prompts, GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == hf_answers
    assert len({tuple(answer) for answer in hf_answers}) > 8, "the answers must vary, or parity says nothing"


@pytest.mark.slow
def test_demo_model_equals_hf_generate_on_64_ragged_real_prompts(demo_path: Path) -> None:
    """``generate`` is asked for all of them, in padded batches: one after the other they would take too long."""
    file = Path(tide_ray.data.__file__).parent / "demo_prompts.jsonl"
    texts = [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(texts) == 64
    engine = TideEngine.from_pretrained(
        str(demo_path), EngineConfig(dtype="float32", device="cpu", max_num_seqs=24, max_model_len=1024)
    )
    chats = [[{"role": "user", "content": text}] for text in texts]
    outputs = engine.generate(chats, SamplingParams(temperature=0, max_tokens=64))
    reference = load(str(demo_path), dtype="float32", device="cpu")
    expected = static_batches(reference, [output.prompt_token_ids for output in outputs], 64, 16, by_length=True)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert {len(answer) == 64 for answer in expected} == {True, False}, "some end by themselves, others do not"


@pytest.mark.slow
def test_bfloat16_demo_model_passes_selfcheck_and_answers(demo_path: Path) -> None:
    engine = TideEngine.from_pretrained(
        str(demo_path), EngineConfig(dtype="bfloat16", device="cpu", max_num_seqs=2, max_model_len=256)
    )
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    output = engine.generate(chat, SamplingParams(temperature=0, max_tokens=24))[0].outputs[0]
    assert "Paris" in output.text
    assert output.finish_reason == "stop"
