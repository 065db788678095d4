"""Routers from calibration to Parquet: the commands a user runs, on a tiny model."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from programs import calibrated, measured, succeeding
from tide_ray import UserError
from tide_ray.exits.checkpoint_files import add_certificates, read_certificates

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def routers(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    return calibrated(tmp_path_factory.mktemp("calibrated"), tiny_llama_folder)


def test_a_job_with_exits_writes_the_depth_of_every_token(ray_cluster: None, job: Any, routers: Path) -> None:
    options = {"exits": str(routers), "exit_threshold": 0.0, "exits_when": "always", "exit_min_depth": 3}
    code, _ = job.run(num_actors=2, num_gpus_per_actor=1, gate_scores=True, **options)
    assert code == 0
    rows = job.rows("data")
    for row in rows:
        first, *others = row["gate_scores"]
        assert math.isnan(first), "no gate was asked for the token that the prompt chose"
        assert len(others) == len(row["exit_layers"]) - 1
        assert all(0 <= score <= 1 for score in others)
    assert len(rows) == job.NUM_ROWS
    # A threshold of 0 lets every token go at the first boundary that the minimum depth allows; the first token of an
    # answer comes from the prompt, which runs every layer.
    assert all(row["exit_layers"] == [4] + [3] * (len(row["exit_layers"]) - 1) for row in rows)
    facts = job.facts()
    assert facts["engine"]["policy"] == "router"
    assert facts["engine"]["exits"]["boundaries"] == [2, 3]
    counters = facts["counters"]
    assert counters["rows_through_layer"][2] - counters["rows_through_layer"][3] == counters["num_filled_rows"] > 0
    with pytest.raises(UserError, match="exit_threshold"):  # another setting is another job
        job.run(**{**options, "exit_threshold": 0.5}, gate_scores=True)


def test_a_verified_job_gives_full_depths_answers_and_counts_its_drafts(
    ray_cluster: None, job: Any, routers: Path
) -> None:
    code, _ = job.run(exits=str(routers), mode="verified", exit_threshold=0.0, exits_when="always")
    assert code == 0
    verified, facts = {row["row_id"]: row for row in job.rows("data")}, job.facts()
    job.out = job.out.with_name("full")
    job.run(output=str(job.out))
    full = {row["row_id"]: row for row in job.rows("data")}
    for name in ("generated_tokens", "generated_text", "exit_layers", "finish_reason"):
        assert {key: row[name] for key, row in verified.items()} == {key: row[name] for key, row in full.items()}
    assert "num_accepted_drafts" not in next(iter(full.values()))
    counters = facts["counters"]
    for name in ("num_accepted_drafts", "num_rejected_drafts"):
        assert sum(row[name] for row in verified.values()) == counters[name] > 0
    assert facts["mode"] == facts["engine"]["mode"] == "verified"


@pytest.fixture(scope="module")
def certified(routers: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint that ``tide-ray certify`` has certified, and the prompts: two thirds for it, then others."""
    folder = tmp_path_factory.mktemp("certified")
    shutil.copytree(routers, folder / "routers")
    prompts = folder / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"item {i}, {3 * i}", "answer": f"{i}"}) + "\n" for i in range(60))
    )
    done = succeeding(
        "certify", folder / "routers", "--prompts", prompts, "--num-prompts", 40,
        "--num-ordering", 10, "--epsilons", "0.3,0.9", "--max-tokens", 12, "--num-threads", 1,
    )  # fmt: skip
    assert "certified settings at delta 0.05" in done.stderr
    return folder / "routers", prompts


def test_a_certified_job_records_its_guarantee_and_rejects_rows_that_would_void_it(
    ray_cluster: None, job: Any, certified: tuple[Path, Path]
) -> None:
    strict, loose = read_certificates(certified[0])
    assert (strict.epsilon, loose.epsilon, loose.num_prompts) == (0.3, 0.9, 30)
    rows = [job.row(i) for i in range(8)]
    rows[5]["sampling_params"] = {"temperature": 0.7}
    rows[6]["sampling_params"] = {"exit_policy": "full"}
    job.write_prompts(rows)
    code, _ = job.run(exits=str(certified[0]), max_disagreement=0.9, ignore_eos=False, max_tokens=12)
    assert code == 3
    (error,) = job.rows("errors")
    assert error["error"] == "temperature: max_disagreement is certified for 0.0 only, got 0.7"
    facts = job.facts()
    assert facts["max_disagreement"] == 0.9
    assert facts["engine"]["exits"]["certificate"] == json.loads(json.dumps(loose.to_json()))
    assert "certification prompts" in facts["engine"]["exits"]["certificate"]["guarantee"] or not loose.has_exits


def test_a_job_whose_rows_disagree_more_than_certified_ends_with_exits_off(
    ray_cluster: None, job: Any, certified: tuple[Path, Path], tmp_path: Path
) -> None:
    routers = tmp_path / "routers"
    shutil.copytree(certified[0], routers)
    loose = replace(read_certificates(routers)[0], epsilon=0.01, thresholds=(0.0, 0.0), prefill_threshold=None)
    add_certificates(routers, [loose], {})
    options = {"exits": str(routers), "max_disagreement": 0.01, "exits_when": "always", "ignore_eos": False}
    code, printed = job.run(**options, shadow=1.0, max_tokens=12)
    assert code == 0
    assert "exits stopped" in printed
    rows, facts = job.rows("data"), job.facts()
    (drift,) = facts["drift"]
    assert drift["share"] == 1.0
    assert drift["tripped_after"] < len(rows)
    assert facts["final_exits"][0]["is_stopped"]
    losses = [row["shadow_loss"] for row in rows if row["shadow_loss"] is not None]
    assert len(losses) == drift["num_shadowed"]
    assert sum(losses) / len(losses) == pytest.approx(drift["mean_loss"], abs=1e-4)
    assert {row["exits_on"] for row in rows} == {True, False}
    with pytest.raises(UserError, match="shadow"):
        job.run(**options, max_tokens=12)


def test_the_certified_benchmark_has_the_figures_of_certification_beside_its_own(certified: tuple[Path, Path]) -> None:
    report = measured(
        "certified", certified[0], "--prompts", certified[1], "--skip", 40,
        "--exit-errors", "0.05", "--max-tokens", 12, "--num-threads", 1,
    )  # fmt: skip
    names = [row["name"] for row in report["variants"]]
    assert names[:5] == ["full depth", "full depth again", "certified 0.3", "certified 0.9", "exit error 0.05"]
    assert report["prompts"] == 20
    assert report["certification"]["noise_floor"]["launches"] == 0.0
    assert len(report["certificates"]) == 2


def test_a_job_with_a_folder_that_is_no_checkpoint_is_refused_before_ray_starts(job: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exits must be a router checkpoint"):
        job.run(exits=str(tmp_path / "nothing"))
