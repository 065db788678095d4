"""The scale benchmark end to end on a tiny model, as a program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).parents[2] / "jobs"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(JOBS / "benchmark.py"), "scale", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT, check=False)


@pytest.mark.slow
def test_actors_are_compared_and_the_driver_is_weighed(tmp_path: Path, tiny_llama_folder: Path) -> None:
    prompts, written = tmp_path / "prompts.jsonl", tmp_path / "scale.json"
    prompts.write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(9)))
    done = run(
        prompts, "--model", tiny_llama_folder, "--dtype", "float32", "--max-tokens", 8, "--max-num-seqs", 4,
        "--actor-rows", 70, "--rounds", 1, "--memory-rows", 50, "--output", written,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(written.read_text()) == report
    actors = report["actors"]
    assert actors["sources"] == ["prompts.jsonl"]
    assert (actors["rows"], actors["max_tokens"], report["num_threads"]) == (70, 8, 1)
    (one,), (two,) = actors["tokens_per_second"]["1"], actors["tokens_per_second"]["2"]
    assert actors["ratio"] == actors["ratio_rounds"][0] == round(two / one, 3)
    (job,) = report["memory"]["jobs"]
    assert job["rows"] == 50
    assert 50e6 < job["peak_rss_bytes"] < 4e9
    assert report["memory"]["bytes_per_row"] == []
    assert "two actors" in done.stdout
    assert "the driver's memory" in done.stdout


def test_a_slope_is_that_of_the_further_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(JOBS))
    from bench_scale import bytes_per_row

    peaks = ((10, 5_000), (110, 25_000), (1_110, 25_500))
    assert bytes_per_row([{"rows": rows, "peak_rss_bytes": peak} for rows, peak in peaks]) == [200, 0.5]


def test_rows_that_do_not_ascend_are_refused() -> None:
    done = run("--memory-rows", "100,10")
    assert (done.returncode, done.stderr) == (2, "error: memory_rows must be ascending, got '100,10'\n")
