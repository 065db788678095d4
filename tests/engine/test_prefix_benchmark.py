"""The prefix benchmark end to end on a tiny model."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from programs import measured


@pytest.mark.slow
def test_shared_examples_come_from_the_cache_and_examples_of_ones_own_do_not(
    tmp_path: Path, tiny_llama_folder: Path
) -> None:
    rows = [{"prompt": f"what is {n} and {n * n}?", "answer": f"{n + n * n} it is"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = measured(
        "prefix", tmp_path / "rows.jsonl", "--shots", 2, "--limit", 5,
        "--model", tiny_llama_folder, "--dtype", "float32", "--max-tokens", 4, "--rounds", 2, "--num-threads", 1,
    )  # fmt: skip
    shared, apart = report["kinds"]
    assert shared["hit_rate"] > 0.4
    assert apart["hit_rate"] < 0.2, "no more than the template"
    for row in (shared, apart):
        medians = {name: statistics.median(seconds) for name, seconds in row["seconds"].items()}
        assert row["speedup"] == pytest.approx(medians["without"] / medians["with"], rel=0.02)
        assert [len(seconds) for seconds in row["seconds"].values()] == [2, 2]
        assert row["agreement"]["identical_answers"] == 1.0
    assert "nothing in common" in report["printed"]
