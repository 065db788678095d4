"""The throughput benchmark end to end on a tiny model, as a program: its JSON, its ratios and its errors."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from programs import ROOT, benchmarked, run

PROGRAM = ROOT / "jobs" / "benchmark.py"


def _write_prompts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> dict[str, Any]:
    """What one run wrote with --output, and what it printed, under ``printed``."""
    folder = tmp_path_factory.mktemp("benchmark")
    long = _write_prompts(folder / "long.jsonl", [f"question {i} " + "word " * i for i in range(9)])
    short = _write_prompts(folder / "short.jsonl", [f"say {i}" for i in range(4)])
    written = folder / "results" / "tiny.json"
    done = run(
        PROGRAM, "throughput", f"{long}:6", short, "--model", tiny_llama_folder, "--dtype", "float32",
        "--max-tokens", 6, "--rounds", 2,
        "--engine-seqs", "4,8", "--hf-batch-sizes", "4,16", "--limit", 9, "--num-threads", 1, "--output", written,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(written.parent.iterdir()) == [written]
    return {**json.loads(written.read_text()), "printed": done.stdout}


@pytest.mark.slow
class TestThroughput:
    def test_the_last_line_is_the_whole_report(self, report: dict[str, Any]) -> None:
        printed = report["printed"].splitlines()
        assert {**json.loads(printed[-1]), "printed": report["printed"]} == report
        for text in ("over best HF", "sorted by length", "attention", "overhead"):
            assert text in report["printed"]

    def test_the_report_says_what_was_measured_and_where(self, report: dict[str, Any]) -> None:
        assert (report["benchmark"], report["dtype"], report["num_threads"]) == ("throughput", "float32", 1)
        assert (report["prompts"], report["sources"]) == (9, ["long.jsonl:6", "short.jsonl"])
        assert (report["max_tokens"], report["rounds"], report["hf_attention"]) == (6, 2, "sdpa")
        assert set(report["versions"]) == {"tide-ray", "torch", "transformers", "ray", "numba-cuda"}
        assert report["hardware"]
        assert report["date"]

    def test_every_contender_runs_and_batches_that_hold_all_prompts_are_not_sorted(
        self, report: dict[str, Any]
    ) -> None:
        assert [(row["name"], row["batch_size"]) for row in report["contenders"]] == [
            ("tide_ray, full depth", 4),
            ("tide_ray, full depth", 8),
            ("HF generate", 4),
            ("HF generate, sorted by length", 4),
            ("HF generate", 16),
        ]

    def test_ratios_are_those_of_the_reported_medians(self, report: dict[str, Any]) -> None:
        rows = report["contenders"]
        best_hf = max(row["tokens_per_second"] for row in rows if row["name"].startswith("HF"))
        best_ours = max(row["tokens_per_second"] for row in rows if row["name"].startswith("tide_ray"))
        assert report["ratio"] == round(best_ours / best_hf, 2)
        for row in rows:
            assert row["slowest"] <= row["tokens_per_second"] <= row["fastest"]
            assert row["ratio_to_best_hf"] == round(row["tokens_per_second"] / best_hf, 2)

    def test_in_float32_every_contender_gives_the_same_answers(self, report: dict[str, Any]) -> None:
        assert report["agreement_with_hf"] == {"identical_answers": 1.0, "tokens_before_difference": 1.0}
        assert len({row["tokens"] for row in report["contenders"]}) == 1

    def test_the_profile_adds_up(self, report: dict[str, Any]) -> None:
        shares = report["profile"]["shares"]
        assert sum(shares.values()) == pytest.approx(1, abs=0.001)
        assert shares["gemm"] + shares["decode_kernel"] > 0
        assert all(shares[part] > 0 for part in ("attention", "elementwise", "head", "sampler", "scheduling"))

    def test_ray_overhead_is_that_of_the_reported_medians(self, report: dict[str, Any]) -> None:
        ray = report["ray"]
        assert len(ray["bare_rounds"]) == len(ray["job_rounds"]) == report["rounds"]
        assert ray["bare_tokens_per_second"] == round(statistics.median(ray["bare_rounds"]), 1)
        assert ray["job_tokens_per_second"] == round(statistics.median(ray["job_rounds"]), 1)
        assert ray["overhead"] == round(1 - ray["job_tokens_per_second"] / ray["bare_tokens_per_second"], 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "error: rounds must be at least 1, got 0"),
        (["--num-threads", "0"], "error: num_threads must be at least 1, got 0"),
        (["--hf-batch-sizes", "4,x"], "error: hf_batch_sizes must be positive integers separated by commas, got '4,x'"),
        (["missing.jsonl"], "error: prompts must be JSONL with a prompt column, got 'missing.jsonl'"),
        (["{prompts}:7"], "has 2 rows, got"),
        (["{prompts}", "--dtype", "int3"], "error: dtype must be one of"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    prompts = _write_prompts(tmp_path / "prompts.jsonl", ["one", "two"])
    done = benchmarked("throughput", *(argument.format(prompts=prompts) for argument in arguments))
    assert done.exit_code == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("load average")]
    assert len(lines) == 1, done.stderr
    assert message in lines[0]


def test_a_program_that_has_loaded_a_model_ends_with_one_line_too(tmp_path: Path, tiny_llama_folder: Path) -> None:
    prompts = _write_prompts(tmp_path / "prompts.jsonl", ["one", "two"])
    done = run(PROGRAM, "throughput", prompts, "--model", tiny_llama_folder, "--max-tokens", 300)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = (line for line in done.stderr.splitlines() if not line.startswith("load average"))
    assert line.startswith("error: max_tokens: the longest prompt needs")


def test_help_does_not_import_torch() -> None:
    code = (  # a script's own folder is on the path when it is run, but not when runpy does it
        f"import runpy, sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); sys.argv = ['b', 'throughput', '--help']; "
        f"runpy.run_path({str(PROGRAM)!r}, run_name='m')"
    )
    check = f"{code}['app'](standalone_mode=False); assert 'torch' not in sys.modules and 'ray' not in sys.modules"
    done = run("-c", check)
    assert done.returncode == 0, done.stderr
    assert "--hf-batch-sizes" in done.stdout
