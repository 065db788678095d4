"""Benchmarks of exits on a tiny model and routers calibrated for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from programs import calibrated, measured

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def routers(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    return calibrated(tmp_path_factory.mktemp("calibrated"), tiny_llama_folder)


def test_the_depth_benchmark_measures_every_launch_policy_beside_its_limits(tiny_llama_folder: Path) -> None:
    report = measured(
        "depth", "--model", tiny_llama_folder, "--dtype", "float32", "--rounds", 2,
        "--scenarios", "2:0.5", "--residents", "1,6", "--tokens", 4, "--min-seconds", 0,
        "--num-threads", 1,
    )  # fmt: skip
    (scenario,) = report["scenarios"]
    assert [row["residents"] for row in scenario["rows"]] == [1, 6]
    for row in scenario["rows"]:
        assert set(row["speedup"]) == {
            "full depth", "all rows must agree", "survivors at once", "wait for half", "chosen", "full depth, again",
        }  # fmt: skip
        assert row["ceiling"] > 1
        assert 1 <= row["bound"] <= row["free_bound"] < 2
        assert row["realised"] == pytest.approx(row["speedup"]["chosen"] / row["bound"], abs=0.01)


def test_the_exits_benchmark_compares_a_checkpoint_with_full_depth(tiny_llama_folder: Path, routers: Path) -> None:
    report = measured(
        "exits", routers, "--model", tiny_llama_folder, "--dtype", "float32",
        "--errors", "0.05", "--prefill-shares", "0.5", "--residents", "2", "--rounds", 2, "--max-tokens", 8,
        "--min-seconds", 0, "--limit", 6, "--num-threads", 1,
    )  # fmt: skip
    base, again, exits, prefill = report["variants"]
    assert (base["name"], again["name"]) == ("full depth", "full depth, again")
    assert base["speedup"] + again["speedup"] == pytest.approx(2, abs=0.002), "both are compared with their mean"
    assert again["teacher_forced"] == [1.0, 1.0, 1.0], "float32 has no noise floor"
    for row in (exits, prefill):
        share, low, high = row["teacher_forced"]
        assert 0 <= low <= share <= high <= 1
    assert prefill["prompt_rows_stopped"] > 0
    assert prefill["mean_depth"] == 4
    assert set(report["residents"][0]["speedup"]) == {"full depth", "exits at 5% error", "full depth, again"}


def test_the_quality_benchmark_separates_kv_policies_from_exit_heads(tiny_llama_folder: Path, routers: Path) -> None:
    report = measured(
        "quality", routers, "--model", tiny_llama_folder, "--dtype", "float32",
        "--shares", "0.5,1.0", "--max-tokens", 8, "--limit", 6, "--num-threads", 1,
    )  # fmt: skip
    assert (report["floor_launches"], report["floor_generation"]) == (1.0, 1.0), "float32 has no noise floor"
    assert [row["depth"] for row in report["boundaries"]] == [2, 3]
    for row in report["boundaries"]:
        assert row["half"]["deferred"] == 1.0, "tokens that do not exit see exact K/V"
        assert set(row["prompt"]) == {"copy", "fitted"}
        half, everything = row["prefill"]
        orders = ("random", "gate", "oracle", "earliest")
        assert all(everything[order] == row["prompt"]["fitted"] for order in orders), "all stop, whoever chooses them"
        assert all(0 <= half[order] <= 1 for order in orders)


def test_the_verified_benchmark_finds_full_depths_answers(tiny_llama_folder: Path, routers: Path) -> None:
    report = measured(
        "verified", routers, "--model", tiny_llama_folder, "--dtype", "float32",
        "--exit-error", "0.05", "--residents", "3", "--rounds", 1, "--max-tokens", 6, "--limit", 4, "--num-threads", 1,
    )  # fmt: skip
    (row,) = report["residents"]
    assert row["residents"] == 3
    assert row["drafts_per_token"]
    assert set(row["identical_answers"].values()) == {1.0}
    assert max(row["drafts_per_token"].values()) > 0
