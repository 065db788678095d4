"""Certification end to end on a tiny model whose deep layers do little, and what it measures against the engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exit_helpers import make_certificate, make_routers
from references import loaded, ragged_prompts, tokens
from tide_ray import EngineConfig, SamplingParams, TideEngine, UserError
from tide_ray.calibrate.calibrate import calibrate
from tide_ray.calibrate.certify import Certification, certify
from tide_ray.calibrate.certify_losses import TokenLosses
from tide_ray.calibrate.config import CalibrationConfig, CertificationConfig
from tide_ray.calibrate.corpus import Example
from tide_ray.calibrate.replay import nothing_stops
from tide_ray.exits.certificates import ExitSetting
from tide_ray.exits.checkpoint import Routers
from tide_ray.exits.checkpoint_files import add_certificates
from tiny_models import TOKENIZER_VOCAB_SIZE, VOCAB_SIZE, build_tiny_model, save_shallow_model

NUM_CALIBRATED, NUM_CERTIFIED = 48, 160
EPSILONS = [0.05, 0.3]
MAX_TOKENS = 16


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_shallow_model(tmp_path_factory.mktemp("shallow"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    generator = torch.Generator().manual_seed(0)
    num_rows = NUM_CALIBRATED + NUM_CERTIFIED
    rows = [torch.randint(6, TOKENIZER_VOCAB_SIZE, (12,), generator=generator).tolist() for _ in range(num_rows)]
    file.write_text("".join(json.dumps({"prompt_token_ids": row}) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def calibrated(model_folder: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("calibrated") / "routers"
    values = {"model": str(model_folder), "prompts": [str(prompts)], "num_prompts": NUM_CALIBRATED, "bottleneck": 16}
    values |= {"dtype": "float32", "max_tokens": 24, "boundaries": [1, 2], "output": str(output)}
    calibrate(CalibrationConfig.build(values))
    return output


def settings(routers: Path, prompts: Path, **changes: object) -> CertificationConfig:
    values = {"routers": str(routers), "prompts": [str(prompts)], "skip": NUM_CALIBRATED, "num_ordering": 40}
    values |= {"epsilons": EPSILONS, "max_tokens": MAX_TOKENS, "prefill_tail": 2}
    return CertificationConfig.build({**values, **changes})


@pytest.fixture(scope="module")
def certified(calibrated: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Certification]:
    routers = tmp_path_factory.mktemp("certified") / "routers"
    shutil.copytree(calibrated, routers)
    return routers, certify(settings(routers, prompts))


def test_several_epsilons_are_certified_with_decode_and_prefill_exits(certified: tuple[Path, Certification]) -> None:
    routers, certification = certified
    strict, loose = Routers.load(routers).certificates
    assert (strict, loose) == tuple(certification.certificates)
    assert (strict.epsilon, loose.epsilon) == (0.05, 0.3)
    assert loose.has_exits
    assert loose.saving > 0.1
    assert loose.saving >= strict.saving
    assert loose.prefill_threshold is not None
    for certificate in (strict, loose):
        assert certificate.num_prompts == NUM_CERTIFIED - 40
        assert certificate.mean_loss < certificate.epsilon
        assert certificate.noise_floor == 0.0, "float32 has none"
        assert certificate.guarantee.startswith("With probability of at least 95%") == certificate.has_exits
    facts = json.loads((routers / "routers.json").read_text())
    assert len(facts["certification"]["tested"]) == loose.num_tested
    assert facts["certification"]["tested"][0]["mean_loss"] <= facts["certification"]["tested"][-1]["mean_loss"]


def test_other_prompts_disagree_no_more_than_certified(
    model_folder: Path, certified: tuple[Path, Certification]
) -> None:
    """Through the engine, made to follow full depth's tokens by prompts that end where each token is chosen."""
    generator = torch.Generator().manual_seed(9)
    new = [torch.randint(6, TOKENIZER_VOCAB_SIZE, (12,), generator=generator).tolist() for _ in range(24)]
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    limits: dict[str, Any] = {"dtype": "float32", "max_model_len": 64, "prefill_tail": 2}
    full = TideEngine.from_pretrained(str(model_folder), EngineConfig(**limits))
    expected = tokens(full.generate(new, params))
    config = EngineConfig(**limits, exits=str(certified[0]), max_disagreement=0.3, exits_when="always")
    engine = TideEngine.from_pretrained(str(model_folder), config)
    outputs = engine.generate(new, params)
    same = []
    for ours, theirs in zip(tokens(outputs), expected, strict=True):
        agreed = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
        same += [True] * agreed + [False] * (agreed < len(theirs))  # what follows a difference answers another prompt
    assert np.mean(same) > 1 - 0.3
    assert engine.stats.num_prefill_exits > 0
    assert engine.stats.rows_through_layer[3] < engine.stats.rows_through_layer[0]


def test_what_is_measured_is_what_the_engine_does(tmp_path: Path) -> None:
    """Choices, depths and prompt rows that stop are the engine's, K/V policy by K/V policy."""
    prompts = ragged_prompts(9, VOCAB_SIZE, longest=20)
    params = SamplingParams(temperature=0, max_tokens=14)
    for kv_policy in ("fitted", "copy", "deferred"):
        model = loaded(build_tiny_model("llama"), eos_token_ids=())
        folder = tmp_path / kv_policy
        make_routers(model, (1, 3), kv_policy=kv_policy).save(folder)
        setting = ExitSetting((0.5, 0.42), 0.5)
        made = make_certificate(folder, prefill_tail=3).with_setting(setting)
        add_certificates(folder, [made], {})
        config = EngineConfig(
            exits=str(folder), max_disagreement=0.02, exits_when="always", prefill_tail=3, max_model_len=64
        )
        engine = TideEngine(model, config)
        answers = [output.outputs[0] for output in engine.generate(prompts, params)]
        stats = engine.stats
        depths = [depth for answer in answers for depth in answer.exit_layers]
        assert len(set(depths)) == 3
        assert stats.num_prefill_exits > 0
        examples = [
            Example([*p, *a.token_ids[:-1]], len(p) - 1, a.token_ids[-1]) for p, a in zip(prompts, answers, strict=True)
        ]
        losses = TokenLosses(
            engine.runner.adapter,
            Routers.load(folder).boundaries,
            kv_policy=kv_policy,
            prefill_tail=3,
            longest=max(len(example.token_ids) for example in examples),
        )
        full, again, exited = losses._replay(1024).run_all(
            examples, [nothing_stops, nothing_stops, losses._gates.stops(setting)]
        )
        assert exited.choices.tolist() == [token for answer in answers for token in answer.token_ids]
        assert exited.depths.tolist() == depths
        assert again.choices.tolist() == full.choices.tolist() != exited.choices.tolist()
        num_prompt_stops = int((exited.all_depths < 4).sum()) - sum(depth < 4 for depth in depths)
        assert num_prompt_stops == stats.num_prefill_exits
        (measured,) = losses.measure(examples, [setting])
        assert measured.losses.mean() == pytest.approx(exited.disagreements(full).mean())
        assert measured.prefill_exit_share == pytest.approx(num_prompt_stops / sum(len(p) - 1 for p in prompts))


def test_full_depth_is_certified_where_no_exit_is_good_enough(
    model_folder: Path, calibrated: Path, prompts: Path, tmp_path: Path
) -> None:
    routers = Routers.load(calibrated)
    for boundary in routers.boundaries:
        torch.nn.init.normal_(boundary.head.up.weight)  # choices at random
        boundary.score_quantiles = (0.0,) * 101  # and no threshold that lets few tokens go
        boundary.prefill_gate, boundary.prefill_quantiles = None, ()
    routers.save(tmp_path / "routers")
    certification = certify(settings(tmp_path / "routers", prompts, epsilons=[0.05]))
    (certificate,) = certification.certificates
    assert not certificate.has_exits
    assert "every token runs full depth" in certificate.guarantee
    config = EngineConfig(
        dtype="float32", max_model_len=64, exits=str(tmp_path / "routers"), max_disagreement=0.05, exits_when="always"
    )
    engine = TideEngine.from_pretrained(str(model_folder), config)
    answer = engine.generate([[7, 8, 9]], SamplingParams(temperature=0, max_tokens=8))[0].outputs[0]
    assert set(answer.exit_layers) == {4}


def test_whole_answers_and_a_task_are_certified_by_letting_the_engine_answer(
    calibrated: Path, prompts: Path, tmp_path: Path
) -> None:
    shutil.copytree(calibrated, tmp_path / "routers")
    few = {"num_prompts": 40, "num_ordering": 16, "max_tokens": 4}
    answers = certify(settings(tmp_path / "routers", prompts, loss="answers", epsilons=[0.6], **few))
    assert all(set(one.losses) <= {0.0, 1.0} for one in answers.tested)
    assert answers.certificates[0].p_value_kind == "binomial"
    config = settings(tmp_path / "routers", prompts, loss="task", epsilons=[0.6], **few)
    task = certify(config, task_loss=lambda _prompt, answer: float(answer[0] % 2))
    assert task.certificates[0].loss == "task"
    losses = {one.loss for one in Routers.load(tmp_path / "routers").certificates}
    assert losses == {"answers", "task"}
    with pytest.raises(UserError, match="loss 'task' goes with a task_loss function, got loss 'task'"):
        certify(config)


def test_what_cannot_be_certified_is_refused_before_anything_runs(
    calibrated: Path, prompts: Path, tmp_path: Path
) -> None:
    def error(**changes: object) -> str:
        with pytest.raises(UserError) as caught:
            certify(settings(calibrated, prompts, **changes))
        return str(caught.value)

    assert "needs at least 59 certification prompts" in error(p_value="hoeffding-bentkus", num_prompts=90)
    assert f"was calibrated on the first {NUM_CALIBRATED} of " in error(skip=NUM_CALIBRATED - 1)
    assert "epsilons must lie between 0 and 1, got [1.5]" in error(epsilons=[1.5])
    assert "p_value 'binomial' needs losses of 0 or 1, got loss 'tokens'" in error(p_value="binomial")
    assert "loss must be one of tokens, answers, task, got 'words'" in error(loss="words")
    assert "num_prompts: the sources have 208 usable prompts" in error(num_prompts=1000)
    assert "dtype: routers were made for 'float32', this engine has 'bfloat16'" in error(dtype="bfloat16")
    assert Routers.load(calibrated).certificates == []
