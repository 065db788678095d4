"""Certificates: in the checkpoint, in the engine's settings, and never held to cover what they do not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exit_helpers import make_certificate, make_routers
from references import loaded
from tide_ray import EngineConfig, SamplingParams, TideEngine, UserError
from tide_ray.engine.exit_setup import exit_rules
from tide_ray.exits.certificates import NEVER, ExitSetting, guarantee_text, pick
from tide_ray.exits.checkpoint import Routers
from tide_ray.exits.checkpoint_files import add_certificates, read_certificates
from tiny_models import build_tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    return loaded(build_tiny_model("llama"))


@pytest.fixture
def checkpoint(model: Any, tmp_path: Path) -> Path:
    make_routers(model, (1, 3)).save(tmp_path / "routers")
    return tmp_path / "routers"


def test_certificates_are_added_replaced_and_read_again(checkpoint: Path) -> None:
    before = Routers.load(checkpoint)
    assert before.certificates == [], "a checkpoint without any is one as well"
    first = [make_certificate(checkpoint, epsilon=epsilon) for epsilon in (0.01, 0.05)]
    add_certificates(checkpoint, first, {"tested": []})
    again = make_certificate(checkpoint, epsilon=0.05, thresholds=(None, 0.7))
    add_certificates(checkpoint, [again], {"tested": []})
    routers = Routers.load(checkpoint)
    assert routers.certificates == [first[0], again] == read_certificates(checkpoint)
    assert routers.identity != before.identity
    assert again.setting == ExitSetting((NEVER, 0.7))


def test_a_certificate_for_other_weights_or_of_another_version_is_refused(checkpoint: Path) -> None:
    made = make_certificate(checkpoint)
    for changed, message in (
        (replace(made, weights_sha256="0" * 64), "a certificate in .* was made for another checkpoint"),
        (replace(made, fingerprint={**made.fingerprint, "dtype": "int8"}), "was made for another checkpoint"),
        (replace(made, thresholds=(0.5,)), "was made for another checkpoint"),
        (replace(made, version=2), "a certificate of version 2, known is 1"),
    ):
        add_certificates(checkpoint, [changed], {})
        with pytest.raises(UserError, match=message):
            Routers.load(checkpoint)
    facts = json.loads((checkpoint / "routers.json").read_text())
    facts["certificates"] = [{"version": 1}]
    (checkpoint / "routers.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="a damaged"):
        Routers.load(checkpoint)
    with pytest.raises(UserError, match="a damaged certificate"):
        read_certificates(checkpoint)


def test_the_largest_epsilon_that_is_not_above_what_is_asked_is_picked(checkpoint: Path) -> None:
    made = [make_certificate(checkpoint, epsilon=epsilon) for epsilon in (0.01, 0.05)]
    answers = make_certificate(checkpoint, epsilon=0.03, loss="answers")
    assert pick([*made, answers], 0.05).epsilon == 0.05
    assert pick([*made, answers], 0.04).epsilon == 0.01
    assert pick([*made, answers], 0.04, "answers").epsilon == 0.03
    with pytest.raises(UserError, match=r"no certificate of tokens for it \(0.01, 0.05\), got 0.005"):
        pick(made, 0.005)
    with pytest.raises(UserError, match=r"\(none; tide-ray certify adds them\), got 0.1"):
        pick([], 0.1)


def test_an_engine_runs_the_certified_setting_and_says_so(model: Any, checkpoint: Path) -> None:
    made = make_certificate(checkpoint, thresholds=(None, 0.25), prefill_threshold=0.5, prefill_tail=4)
    add_certificates(checkpoint, [made], {})
    config = {"exits": str(checkpoint), "max_disagreement": 0.02, "max_model_len": 64}
    with pytest.raises(UserError, match="prefill_tail: max_disagreement is certified for 4, got 32"):
        TideEngine(model, EngineConfig(**config))
    engine = TideEngine(model, EngineConfig(**config, prefill_tail=4))
    facts = engine.describe()
    assert facts["exits"]["thresholds"] == [None, 0.25]
    assert facts["exits"]["prefill_thresholds"] == [0.5, 0.5]
    assert facts["exits"]["certificate"]["guarantee"] == made.guarantee
    assert facts["prefix_caching"] is False, "a shared page would keep another prompt's choice"
    json.dumps(facts)
    with pytest.raises(UserError, match="kv_policy: routers were made for 'fitted', this engine has 'copy'"):
        TideEngine(model, EngineConfig(**config, prefill_tail=4, kv_policy="copy"))
    with pytest.raises(UserError, match="no certificate of answers for it"):
        TideEngine(model, EngineConfig(**config, prefill_tail=4, certified_loss="answers"))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": 0.5}, "temperature: max_disagreement is certified for 0.0 only, got 0.5"),
        ({"repetition_penalty": 1.2}, "repetition_penalty: max_disagreement is certified for 1.0 only, got 1.2"),
        ({"ignore_eos": True}, "ignore_eos: max_disagreement is certified for False only, got True"),
        ({"min_tokens": 2}, "min_tokens: max_disagreement is certified for 0 only, got 2"),
        ({"exit_threshold": 0.1}, "exit_threshold: max_disagreement is certified for None only, got 0.1"),
        ({"exit_min_depth": 2}, "exit_min_depth: max_disagreement is certified for None only, got 2"),
        ({"exit_policy": "confidence"}, "exit_policy: max_disagreement is certified for 'router' only"),
        ({"max_tokens": 33}, "max_tokens: max_disagreement is certified for answers of up to 32 tokens, got 33"),
    ],
)
def test_a_request_that_it_would_not_hold_for_is_rejected(
    model: Any, checkpoint: Path, params: dict[str, Any], message: str
) -> None:
    add_certificates(checkpoint, [make_certificate(checkpoint)], {})
    config = EngineConfig(exits=str(checkpoint), max_disagreement=0.02, max_model_len=64)
    given = SamplingParams(**{"temperature": 0.0, **params})
    with pytest.raises(UserError, match=message):
        exit_rules(config, Routers.load(checkpoint), given)
    assert message in TideEngine(model, config).generate([[5, 6, 7]], given)[0].error


def test_a_certified_engine_warms_up_too(model: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its warm-up ignores EOS, which no certificate holds for: it was rejected, and the first request was slow."""
    add_certificates(checkpoint, [make_certificate(checkpoint)], {})
    engine = TideEngine(model, EngineConfig(exits=str(checkpoint), max_disagreement=0.02, max_model_len=64))
    counted: list[int] = []
    reset = engine.stats.reset
    monkeypatch.setattr(type(engine.stats), "reset", lambda stats: (counted.append(stats.num_steps), reset()))
    engine.warm_up()
    assert counted == [2]


def test_a_request_may_still_ask_for_full_depth(checkpoint: Path) -> None:
    add_certificates(checkpoint, [make_certificate(checkpoint, prefill_threshold=0.5)], {})
    config = EngineConfig(exits=str(checkpoint), max_disagreement=0.02)
    rules = exit_rules(config, Routers.load(checkpoint), SamplingParams(exit_policy="full", temperature=0.7))
    assert rules.thresholds == (NEVER, NEVER)
    assert not rules.prompt_exits


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit_error": 0.01}, "max_disagreement and exit_error exclude each other, got exit_error 0.01"),
        ({"exit_threshold": 0.9}, "max_disagreement and exit_threshold exclude each other"),
        ({"exit_min_depth": 2}, "max_disagreement and exit_min_depth exclude each other"),
        ({"prefill_share": 0.5}, "max_disagreement and prefill_share exclude each other"),
        ({"policy": "full"}, "max_disagreement needs policy 'router', got policy 'full'"),
        ({"policy": "posthoc"}, "max_disagreement needs policy 'router', got policy 'posthoc'"),
        ({"exits": None}, "max_disagreement needs exits, a router checkpoint, got 0.01"),
        ({"max_disagreement": 0.0}, r"max_disagreement must be in \(0, 1\], got 0.0"),
        ({"certified_loss": "words"}, "certified_loss must be one of tokens, answers, task, got 'words'"),
    ],
)
def test_what_a_certificate_settles_is_not_set_beside_it(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EngineConfig(**{"exits": "routers", "max_disagreement": 0.01, **settings})


def test_the_guarantee_says_what_holds_and_for_what(checkpoint: Path) -> None:
    text = guarantee_text(make_certificate(checkpoint))
    for part in (
        "at least 95%",
        "1,000 certification prompts",
        "at most 2.00%",
        "up to 32 tokens",
        "float32",
        "fitted",
    ):
        assert part in text
    full = guarantee_text(make_certificate(checkpoint, thresholds=(None, None)))
    assert "every token runs full depth" in full
