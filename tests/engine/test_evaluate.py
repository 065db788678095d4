"""Evaluation: what a setting costs on other prompts, against full depth and against right answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from exit_helpers import make_certificate, make_routers
from references import greedy, loaded
from tide_ray import EngineConfig, TideEngine, UserError
from tide_ray.calibrate.config import EvaluationConfig
from tide_ray.calibrate.evaluate import evaluate, is_right, last_number
from tide_ray.calibrate.follow import answer, follow, interval
from tide_ray.calibrate.job import run_evaluate
from tide_ray.exits.checkpoint import add_certificates
from tide_ray.models import load
from tiny_models import TOKENIZER_VOCAB_SIZE, build_tiny_model, tiny_tokenizer

NUM_PROMPTS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, routers for it with two certificates, and prompts."""
    folder = tmp_path_factory.mktemp("evaluated")
    build_tiny_model("llama", vocab_size=TOKENIZER_VOCAB_SIZE).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    model = load(folder / "model", dtype="float32", device="cpu")
    make_routers(model, (1, 3)).save(folder / "routers")
    certificates = [
        make_certificate(folder / "routers", epsilon=0.01, thresholds=(None, None)),
        make_certificate(
            folder / "routers", epsilon=0.9, thresholds=(0.48, 0.5), prefill_threshold=0.5, prefill_tail=32
        ),
    ]
    add_certificates(folder / "routers", certificates, {"tested": []})
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(6, TOKENIZER_VOCAB_SIZE, (40,), generator=generator).tolist() for _ in range(NUM_PROMPTS)]
    lines = [json.dumps({"prompt_token_ids": row, "answer": "7"}) + "\n" for row in rows]
    (folder / "prompts.jsonl").write_text("".join(lines))
    return folder


def settings(folder: Path, **changes: object) -> EvaluationConfig:
    values = {"routers": str(folder / "routers"), "model": str(folder / "model"), "max_tokens": 8}
    return EvaluationConfig.build({**values, "prompts": [str(folder / "prompts.jsonl")], **changes})


def test_settings_are_compared_with_full_depth_and_with_fixed_layers(folder: Path, tmp_path: Path) -> None:
    facts = run_evaluate(settings(folder, output=str(tmp_path / "facts.json"), skip=2))
    assert json.loads((tmp_path / "facts.json").read_text()) == facts
    assert facts["prompts"] == NUM_PROMPTS - 2
    assert facts["sources"] == ["prompts.jsonl"]
    rows = {row["name"]: row for row in facts["variants"]}
    assert rows["full depth again"]["disagreement"] == [0.0, 0.0, 0.0], "float32 has no noise"
    strict, loose = rows["certified 0.01"], rows["certified 0.9"]
    assert strict["disagreement"][0] == 0.0
    assert strict["identical_answers"][0] == 1.0
    assert strict["mean_depth"] == 4
    assert strict["median_first_divergence"] is None
    assert loose["disagreement"][0] > 0
    assert loose["mean_depth"] < 4
    assert loose["prompt_rows_stopped"] > 0
    assert loose["ceiling_in_layers"] > 1
    assert 0 <= loose["median_first_divergence"] < 8
    for row in (strict, loose, rows["full depth"], rows["every token stops at one depth"]):
        assert 0 <= row["right_answers"][0] <= 1
    assert "layers skipped evenly" in rows


def test_error_levels_are_evaluated_beside_certificates(folder: Path) -> None:
    facts = evaluate(settings(folder, exit_errors=[0.02], max_disagreements=[0.01], baselines=False))
    assert [row["name"] for row in facts["variants"]] == [
        "full depth",
        "full depth again",
        "certified 0.01",
        "exit error 0.02",
    ]


def test_what_cannot_be_evaluated_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no certificate of tokens for it \(0.01, 0.9\), got 0.001"):
        evaluate(settings(folder, max_disagreements=[0.001]))
    with pytest.raises(UserError, match=f"skip: the sources have {NUM_PROMPTS} usable prompts, got {NUM_PROMPTS}"):
        evaluate(settings(folder, skip=NUM_PROMPTS))
    model = load(folder / "model", dtype="float32", device="cpu")
    make_routers(model, (2,)).save(tmp_path / "bare")
    with pytest.raises(UserError, match="the checkpoint has no certificates; give exit_errors, or certify it first"):
        evaluate(settings(folder, routers=str(tmp_path / "bare")))


def test_following_compares_after_the_tokens_to_follow_and_leaves_the_engine_as_it_was() -> None:
    model = build_tiny_model("llama")  # the engine takes over its own
    engine = TideEngine(loaded(build_tiny_model("llama"), eos_token_ids=()), EngineConfig(max_model_len=32))
    prompts = [[5, 6, 7], [8, 9]]
    own = answer(engine, prompts, 6)
    assert own == [greedy(model, prompt, 6) for prompt in prompts]
    changed = [list(one) for one in own]
    changed[1][2] = (changed[1][2] + 1) % 256
    same = follow(engine, prompts, changed)
    assert same[0] == [True] * 6
    assert same[1][:3] == [True, True, False]
    after = [greedy(model, [*prompts[1], *changed[1][:n]], 1)[0] == changed[1][n] for n in range(6)]
    assert same[1] == after
    assert answer(engine, prompts, 6) == own


def test_intervals_are_over_prompts() -> None:
    mean, low, high = interval([0.0, 0.1, 0.2, 0.1] * 20)
    assert mean == pytest.approx(0.1)
    assert low < mean < high
    assert interval([0.0, 1.0], weights=[3, 1])[0] == 0.25
    assert interval([0.5])[0] == 0.5


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        ("so 3 * 4 = 12", "12", True),
        ("#### 1,234.50", "1234.5", True),
        ("the answer is 12 apples", "#### 13", False),
        ("no number", "5", False),
        ("yes", "yes", True),
        ("-3", "3", False),
    ],
)
def test_answers_are_marked_by_their_last_number(text: str, expected: Any, right: bool) -> None:
    assert is_right(text, expected) == right
    assert last_number("nothing") is None
