"""Report pages: whole by themselves, escaped, with the figures of the facts they are made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from exit_helpers import make_certificate, make_routers
from pages import Page, words
from references import loaded
from tide_ray.calibrate import figures
from tide_ray.calibrate.pages import write_evaluation_page, write_report, write_sweep_page
from tide_ray.exits.checkpoint_files import add_certificates
from tide_ray.pages.drawing import COLOURS
from tiny_models import build_tiny_model

EVIL = "<script>alert(1)</script> costs $1$ & [bold]more"


def candidate(depth: int, share: float) -> dict[str, Any]:
    exits = {
        level: {"share": share, "error": 0.01, "ceiling": 1 / (1 - share / 2), "oracle_share": share}
        for level in ("0.01", "0.05")
    }
    return {
        "depth": depth, "lens_agreement": 0.4, "head_agreement": 0.8123, "mean_cosine": 0.3, "auc": 0.9, "ece": 0.02,
        "share_cosine_above_0.98": 0.0, "exits": exits, "reliability": [[0.1, 0.2, 5], [0.9, 0.8, 5]],
        "coverage": {"share": [0.5, 1.0], "by_gate": [0.95, 0.8], "by_probability": [0.9, 0.8]},
    }  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    routers = make_routers(loaded(build_tiny_model("llama")), (1, 3))
    kv = {"exit_share": 0.3, "disagreement": [0.0412, 0.03, 0.05], "others": [0.02, 0.01, 0.03]}
    routers.facts.metrics.update(
        {
            "candidates": [candidate(1, 0.1), candidate(3, 0.3)],
            "screened": {"1": 0.05, "2": 0.0123, "3": 0.2},
            "profile": {"depth": [1, 2, 3], "lens_agreement": [0.1, 0.2, 0.4], "cosine": [0.1, 0.1, 0.3]},
            "kv_policies": [{"kv_policy": "fitted", **kv}],
            "seconds": {"total": 12.0},
        }
    )
    routers.facts.training.update({"source": "own answers", "tokens": 1234, "settings": {"model": EVIL}})
    routers.save(tmp_path / "routers")
    return tmp_path / "routers"


def test_a_checkpoints_page_has_all_of_its_figures_and_nothing_from_elsewhere(checkpoint: Path) -> None:
    certificates = [make_certificate(checkpoint, epsilon=0.05), make_certificate(checkpoint, epsilon=0.9)]
    add_certificates(checkpoint, certificates, {"tested": [{}] * 7})
    page = Page(write_report(checkpoint))
    page.check_needs_nothing_else()
    assert EVIL in page.text, "as text, not as markup"
    for fact in ("0.812", "1,234", "4.12 (3.0-5.0)", "2 (1.2%)", "7 settings tested", certificates[0].guarantee):
        assert fact in page.text
    assert "this model gains at most 1.18x in decode" in page.text
    profile, coverage, reliability = map(words, page.images())
    assert "depth (layers run)" in profile
    assert "precision" in coverage
    assert "depth 3 (ECE 0.020)" in reliability


def test_a_checkpoint_that_knows_little_of_itself_has_a_page_too(tmp_path: Path) -> None:
    make_routers(loaded(build_tiny_model("llama")), (2,)).save(tmp_path / "routers")
    page = Page(write_report(tmp_path / "routers"))
    assert "adds certificates" in page.text
    assert not page.images()


def test_a_checkpoint_of_an_older_version_has_the_figures_that_it_knows(checkpoint: Path) -> None:
    facts = json.loads((checkpoint / "routers.json").read_text())
    del facts["metrics"]["profile"], facts["metrics"]["kv_policies"]
    for row in facts["metrics"]["candidates"]:
        del row["reliability"], row["coverage"]
    (checkpoint / "routers.json").write_text(json.dumps(facts))
    page = Page(write_report(checkpoint))
    assert len(page.images()) == 1
    assert "0.812" in page.text


def test_the_page_of_a_sweep_compares_models_and_says_what_failed(tmp_path: Path) -> None:
    done = {
        "name": "a model", "model": EVIL, "status": "ok", "num_layers": 4, "boundaries": [3], "error": None,
        "agreement": {"1": 0.5, "3": 0.9}, "exit_share": {"0.01": 0.25}, "ceiling": 1.07, "suitability": "gains",
        "verdict": "it gains", "seconds": {"total": 3.0},
    }  # fmt: skip
    failed = {"name": "other", "model": "x", "status": "failed", "phase": "load", "error": f"no {EVIL}"}
    page = Page(write_sweep_page(tmp_path, [done, failed]))
    page.check_needs_nothing_else()
    assert ("a", {"href": "a%20model/report.html"}) in page.tags
    for fact in ("25.0%", "1.07", "it gains", f"no {EVIL}"):
        assert fact in page.text
    assert "a model" in words(page.images()[0])
    assert not Page(write_sweep_page(tmp_path, [failed])).images()


def variants() -> list[dict[str, Any]]:
    return [
        {"name": "full depth", "mean_depth": 4, "mean_cost": 1.0, "speed": [1.0, 1.0, 1.0]},
        {"name": "full depth again", "disagreement": [0.01, 0.005, 0.02]},
        {
            "name": "certified 0.05", "disagreement": [0.03, 0.02, 0.04], "speed": [1.2, 1.1, 1.3], "mean_depth": 3.5,
            "exit_share": 0.2, "mean_cost": 0.8, "prompt_rows_stopped": 0.1, "identical_answers": [0.5, 0.4, 0.6],
            "first_divergence": [5.0, 4.0, 7.0], "perplexity_ratio": [1.02, 1.01, 1.03],
        },
        {"name": EVIL, "is_baseline": True, "disagreement": [0.3, 0.2, 0.4], "speed": [0.9, 0.8, 1.0], "exit_share": 1},
    ]  # fmt: skip


def test_the_page_of_an_evaluation_has_its_table_and_its_plot(tmp_path: Path) -> None:
    facts = {
        "model": EVIL, "dtype": "float32", "boundaries": [1, 3], "kv_policy": "fitted", "prompts": 10, "rounds": 2,
        "sources": [], "text": "t.txt", "paragraphs": 3, "max_tokens": 8, "variants": variants(),
        "baselines": {"at_the_cost_of": "certified 0.05", "left_out": {"capacity": "no reason"}},
    }  # fmt: skip
    page = Page(write_evaluation_page(tmp_path / "facts.html", facts))
    page.check_needs_nothing_else()
    for fact in (
        "3.00 (2.0-4.0)",
        "5 (4-7)",
        "1.020 (1.010-1.030)",
        "1.20 (1.10-1.30)",
        "left out: capacity: no reason",
    ):
        assert fact in page.text
    assert "right %" not in page.text, "no answers to compare with"
    assert EVIL in words(page.images()[0])


def test_the_same_facts_make_the_same_figure_and_only_other_rules_are_hollow() -> None:
    svg = figures.quality_and_speed(variants())
    assert svg == figures.quality_and_speed(variants())
    own, baseline = (colour.lower() for colour in COLOURS[:2])
    assert f"fill: #ffffff; stroke: {baseline}" in svg.decode()
    assert f"fill: #ffffff; stroke: {own}" not in svg.decode()
    assert "full depth again" in words(ElementTree.fromstring(svg)), "the noise floor"
