"""The scale benchmark end to end on a tiny model, as a program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_scale import bytes_per_row

from programs import ROOT, benchmarked, run


@pytest.mark.slow
def test_actors_are_compared_and_the_driver_is_weighed(tmp_path: Path, tiny_llama_folder: Path) -> None:
    prompts, written = tmp_path / "prompts.jsonl", tmp_path / "scale.json"
    prompts.write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(9)))
    done = run(
        ROOT / "jobs" / "benchmark.py", "scale", prompts, "--model", tiny_llama_folder, "--dtype", "float32",
        "--max-tokens", 8, "--max-num-seqs", 4,
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


def test_a_slope_is_that_of_the_further_rows() -> None:
    peaks = ((10, 5_000), (110, 25_000), (1_110, 25_500))
    assert bytes_per_row([{"rows": rows, "peak_rss_bytes": peak} for rows, peak in peaks]) == [200, 0.5]


def test_rows_that_do_not_ascend_are_refused() -> None:
    done = benchmarked("scale", "--memory-rows", "100,10")
    assert (done.exit_code, done.stderr) == (2, "error: memory_rows must be ascending, got '100,10'\n")
