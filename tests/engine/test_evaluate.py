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
from tide_ray.calibrate.follow import answer, follow, follow_text
from tide_ray.calibrate.job import run_evaluate
from tide_ray.exits.checkpoint_files import add_certificates
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


def test_settings_are_compared_with_full_depth_and_with_other_rules_at_the_same_cost(
    folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"paragraph {n} says that {n} comes after {n - 1}" for n in range(9)))
    facts = run_evaluate(
        settings(folder, output=str(tmp_path / "facts.json"), skip=2, text=str(text), num_paragraphs=6, rounds=1)
    )
    assert json.loads((tmp_path / "facts.json").read_text()) == facts
    assert "certified 0.9" in (tmp_path / "facts.html").read_text()
    assert (facts["prompts"], facts["paragraphs"]) == (NUM_PROMPTS - 2, 6)
    assert facts["sources"] == ["prompts.jsonl"]
    rows = {row["name"]: row for row in facts["variants"]}
    assert rows["full depth again"]["disagreement"] == [0.0, 0.0, 0.0], "float32 has no noise"
    strict, loose = rows["certified 0.01"], rows["certified 0.9"]
    assert strict["disagreement"][0] == 0.0
    assert strict["identical_answers"] == pytest.approx([1.0, 0.025 ** (1 / 10), 1.0], abs=1e-4), "exact, not resampled"
    assert (strict["mean_depth"], strict["mean_cost"], strict["exit_share"]) == (4, 1, 0)
    assert strict["first_divergence"] is None
    assert strict["perplexity_ratio"] == pytest.approx([1.0] * 3, abs=1e-4)
    assert loose["disagreement"][0] > 0
    assert loose["mean_depth"] < 4
    assert loose["prompt_rows_stopped"] > 0
    assert loose["mean_cost"] < 1 < loose["ceiling_in_layers"]
    assert loose["first_divergence"][1] <= loose["first_divergence"][0] <= loose["first_divergence"][2] < 8
    assert loose["perplexity_ratio"][1] <= loose["perplexity_ratio"][0] <= loose["perplexity_ratio"][2]
    assert loose["perplexity_ratio"][0] != 1
    assert facts["baselines"] == {"at_the_cost_of": "certified 0.9", "left_out": {}}
    others = [row for row in facts["variants"] if row.get("is_baseline")]
    assert [row["name"] for row in others] == [
        "every token stops at one depth",
        "layers skipped evenly",
        "confidence",
        "capacity",
        "post hoc, all layers run",
    ]
    for name in ("confidence", "capacity"):
        assert rows[name]["mean_cost"] == pytest.approx(loose["mean_cost"], abs=0.08)
    posthoc = rows["post hoc, all layers run"]
    assert posthoc["mean_cost"] == 1, "it only selects states"
    assert posthoc["mean_depth"] == pytest.approx(loose["mean_depth"], abs=0.3)
    for row in (strict, loose):
        assert 0 < row["speed_in_jobs"][1] <= row["speed_in_jobs"][0] <= row["speed_in_jobs"][2]
    for row in (strict, loose, *others):
        assert 0 < row["speed"][1] <= row["speed"][0] <= row["speed"][2]
        assert 0 <= row["right_answers"][1] <= row["right_answers"][0] <= row["right_answers"][2] <= 1


def test_where_nothing_stops_there_is_no_cost_to_compare_at(folder: Path) -> None:
    facts = evaluate(settings(folder, max_disagreements=[0.01], rounds=1))
    assert facts["baselines"]["left_out"] == {"all": "no setting lets anything stop"}
    assert [row["name"] for row in facts["variants"]] == ["full depth", "full depth again", "certified 0.01"]


def test_the_perplexity_of_a_text_is_the_models_own(folder: Path) -> None:
    model = build_tiny_model("llama")
    engine = TideEngine(loaded(build_tiny_model("llama"), eos_token_ids=()), EngineConfig(max_model_len=32))
    texts = [[5, 6, 7, 8, 9], [10, 11, 12]]
    for text, logprobs in zip(texts, follow_text(engine, texts), strict=True):
        rows = model(torch.tensor([text])).logits[0].log_softmax(-1)
        expected = [float(rows[n, token]) for n, token in enumerate(text[1:])]
        assert logprobs == pytest.approx(expected, abs=1e-4)


def test_error_levels_are_evaluated_beside_certificates(folder: Path) -> None:
    facts = evaluate(settings(folder, exit_errors=[0.02], max_disagreements=[0.01], baselines=False, rounds=1))
    assert [row["name"] for row in facts["variants"]] == [
        "full depth",
        "full depth again",
        "certified 0.01",
        "exit error 0.02",
    ]


def test_what_cannot_be_evaluated_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no certificate of tokens for it \(0.01, 0.9\), got 0.001"):
        evaluate(settings(folder, max_disagreements=[0.001]))
    (tmp_path / "short.txt").write_text("short\n")
    with pytest.raises(UserError, match="text: it has no paragraph that is long enough"):
        evaluate(settings(folder, text=str(tmp_path / "short.txt")))
    with pytest.raises(UserError, match="output is for JSON, its page lies beside it"):
        run_evaluate(settings(folder, output="facts.html"))
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
