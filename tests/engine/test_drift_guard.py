"""The drift guard on an engine: prompts of the certified kind leave exits on, others end them."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from references import tokens
from tide_ray import EngineConfig, RequestOutput, SamplingParams, TideEngine
from tide_ray.calibrate.calibrate import calibrate
from tide_ray.calibrate.certify import certify
from tide_ray.calibrate.config import CalibrationConfig, CertificationConfig
from tide_ray.data.logs import JobLog
from tide_ray.data.shadow import DriftGuard, OrderedLosses, ShadowOptions, is_shadowed
from tide_ray.engine.async_engine import AsyncEngine
from tide_ray.exits.certificates import ExitSetting
from tide_ray.exits.checkpoint_files import add_certificates, read_certificates
from tiny_models import TOKENIZER_VOCAB_SIZE, save_shallow_model

EPSILON, MAX_TOKENS = 0.3, 12
ALL = ShadowOptions(share=1.0, seed=0, delta=0.05)
PARAMS = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)


def prompts_like_certified(num: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(6, TOKENIZER_VOCAB_SIZE, (12,), generator=generator).tolist() for _ in range(num)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_shallow_model(tmp_path_factory.mktemp("shallow"))


@pytest.fixture(scope="module")
def certified(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Routers calibrated on 48 prompts and certified on 80 others, with 30 more to order the settings."""
    folder = tmp_path_factory.mktemp("certified")
    file, routers = folder / "prompts.jsonl", folder / "routers"
    file.write_text("".join(json.dumps({"prompt_token_ids": row}) + "\n" for row in prompts_like_certified(158, 0)))
    values: dict[str, Any] = {"prompts": [str(file)], "max_tokens": MAX_TOKENS}
    model_values = {"model": str(model), "dtype": "float32", "boundaries": [1, 2], "bottleneck": 16}
    calibrate(CalibrationConfig.build({**values, **model_values, "num_prompts": 48, "output": str(routers)}))
    certifying = {"routers": str(routers), "skip": 48, "num_ordering": 30, "epsilons": [EPSILON], "prefill_tail": 2}
    certify(CertificationConfig.build({**values, **certifying}))
    assert read_certificates(routers)[0].has_exits
    return routers


def run_guarded(
    model: Path, routers: Path, epsilon: float, prompts: Sequence[list[int]], params: SamplingParams = PARAMS
) -> tuple[DriftGuard, list[tuple[RequestOutput, float | None, bool]], list[RequestOutput], dict[str, Any]]:
    """The guard, what it gave for every row, answers to the first rows once more afterwards, and facts of exits."""
    config = EngineConfig(
        dtype="float32", device="cpu", max_model_len=64, max_num_seqs=8, prefill_tail=2, prefix_caching=False,
        exits=str(routers), max_disagreement=epsilon, exits_when="always",
    )  # fmt: skip
    engine = AsyncEngine(lambda: TideEngine.from_pretrained(str(model), config))
    try:
        guard = DriftGuard(engine, read_certificates(routers)[0], ALL, JobLog(logging.getLogger(__name__), "job"))

        async def answer_all() -> tuple[list[Any], list[RequestOutput]]:
            rows = (guard.answer(str(n), params, partial(engine.generate, p, params)) for n, p in enumerate(prompts))
            done = await asyncio.gather(*rows)
            return done, [await engine.generate(prompt, params) for prompt in prompts[:4]]

        done, again = asyncio.run(answer_all())
        facts = engine.engine.describe_exits()
        assert facts is not None
        return guard, done, again, facts
    finally:
        engine.close()


def test_prompts_of_the_certified_kind_leave_exits_on_over_a_long_run(model: Path, certified: Path) -> None:
    guard, done, again, facts = run_guarded(model, certified, EPSILON, prompts_like_certified(200, 7))
    losses = [loss for _, loss, _ in done if loss is not None]
    assert len(losses) == guard.test.num_losses == 200
    assert guard.test.mean_loss == pytest.approx(sum(losses) / 200)
    assert 0 < guard.test.mean_loss < EPSILON
    assert not guard.test.has_tripped
    assert all(exits_on for _, _, exits_on in done)
    assert not facts["is_stopped"]
    assert tokens(again) == [output.outputs[0].token_ids for output, _, _ in done[:4]]
    assert min(depth for output in again for depth in output.outputs[0].exit_layers) < 4


@pytest.fixture(scope="module")
def loosened(certified: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same routers with thresholds that nobody certified: every token exits at the first boundary."""
    folder = tmp_path_factory.mktemp("loosened") / "routers"
    shutil.copytree(certified, folder)
    (certificate,) = read_certificates(folder)
    loose = replace(certificate, epsilon=0.05).with_setting(ExitSetting((0.0, 0.0)))
    raw = json.loads((folder / "routers.json").read_text())
    (folder / "routers.json").write_text(json.dumps({**raw, "certificates": []}))
    add_certificates(folder, [loose], {})
    return folder


def test_other_prompts_under_a_loosened_threshold_end_exits(model: Path, loosened: Path) -> None:
    prompts = [[6 + n % 50] * (3 + n % 9) for n in range(120)]
    guard, done, again, facts = run_guarded(model, loosened, 0.05, prompts)
    assert guard.test.tripped_after is not None
    assert guard.test.tripped_after < 60
    assert facts["is_stopped"]
    assert {exits_on for _, _, exits_on in done} == {True, False}
    assert {depth for output in again for depth in output.outputs[0].exit_layers} == {4}
    found = guard.facts()
    assert (found["share"], found["epsilon"], found["delta"]) == (1.0, 0.05, 0.05)
    full = EngineConfig(dtype="float32", device="cpu", max_model_len=64)
    expected = TideEngine.from_pretrained(str(model), full).generate(prompts[:4], PARAMS)
    assert tokens(again) == tokens(expected)


def test_rows_are_shadowed_by_their_ids() -> None:
    options = ShadowOptions(share=0.1, seed=1, delta=0.05)
    chosen = [is_shadowed(f"row-{n}", options) for n in range(5000)]
    assert 420 < sum(chosen) < 580
    assert chosen == [is_shadowed(f"row-{n}", options) for n in range(5000)]
    other = replace(options, seed=2)
    assert chosen != [is_shadowed(f"row-{n}", other) for n in range(5000)]
    assert all(is_shadowed(f"row-{n}", replace(options, share=1.0)) for n in range(100))


def test_losses_are_tested_in_the_order_of_their_rows() -> None:
    """Rows that end early have short answers: taken as they end, losses would hang on lengths."""
    tested: list[float] = []
    losses = OrderedLosses(tested.append)
    first, second, third, fourth = (losses.ticket() for _ in range(4))
    losses.settle(third, 0.3)
    losses.settle(second, None)
    assert tested == []
    losses.settle(first, 0.1)
    losses.settle(fourth, 0.4)
    assert tested == [0.1, 0.3, 0.4]
