"""The peers benchmark end to end on a tiny model, without OpenVINO: that reads only GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from programs import benchmarked, measured


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("peers")
    for name, count in (("long", 5), ("short", 3)):
        rows = [json.dumps({"prompt": f"{name} question {i} " + "word " * i}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return measured(
        "peers", "--prompts", f"{folder / 'long.jsonl'}:4", "--prompts", folder / "short.jsonl",
        "--model", tiny_llama_folder, "--dtype", "float32", "--max-tokens", 6, "--rounds", 2,
        "--engine-seqs", "2,4", "--hf-batch-sizes", 4, "--num-threads", 1,
    )  # fmt: skip


@pytest.mark.slow
class TestPeers:
    def test_everyone_answers_the_prompts_of_all_files(self, report: dict[str, Any]) -> None:
        assert (report["prompts"], report["sources"], report["openvino"]) == (7, ["long.jsonl:4", "short.jsonl"], None)
        assert [(row["name"], row["batch_size"]) for row in report["contenders"]] == [
            ("tide_ray, full depth", 2),
            ("tide_ray, full depth", 4),
            ("HF generate", 4),
            ("HF generate, sorted by length", 4),
        ]
        assert report["agreement_with_hf"]["identical_answers"] == 1.0

    def test_ratios_are_of_everyones_best_batch_size(self, report: dict[str, Any]) -> None:
        rates = dict.fromkeys(("tide_ray", "HF"), 0.0)
        for row in report["contenders"]:
            name = row["name"].split()[0].rstrip(",")
            rates[name] = max(rates[name], row["tokens_per_second"])
        expected = round(rates["tide_ray"] / rates["HF"], 2)
        assert report["ratios"] == {"tide_ray, full depth": 1.0, "HF generate": expected}

    def test_the_roofline_is_the_lower_of_reading_weights_and_computing(self, report: dict[str, Any]) -> None:
        limits = report["roofline"]
        num_weights = limits["weight_bytes"] / 4
        for size, rate in limits["tokens_per_second"].items():
            reading = limits["weight_bytes"] / limits["copy_bytes_per_second"]
            computing = 2 * num_weights * int(size) / limits["gemm_flops_per_second"]
            assert rate == pytest.approx(int(size) / max(reading, computing), rel=1e-3)
        assert 0 < report["roofline_share"] < 1
        assert "roofline:" in report["printed"]


def test_a_checkpoint_that_is_not_there_is_one_line_and_exit_code_2(tiny_llama_folder: Path) -> None:
    done = benchmarked("peers", "--model", tiny_llama_folder, "--exits", "nowhere", "--limit", 2, "--dtype", "float32")
    assert done.exit_code == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("load average")]
    assert len(lines) == 1, done.stderr
    assert "nowhere" in lines[0]
