"""Two runs of the same prompts side by side: every number against plain Python on the same rows."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from analytics_helpers import NUM_LAYERS, make_rows, num_tokens, run_facts, write_output
from pages import Page
from tide_ray.analytics import load
from tide_ray.analytics.comparison import median_parting
from tide_ray.analytics.report import make_report
from tide_ray.cli import app

ROWS = make_rows(60)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """A run with exits. Read only."""
    return write_output(
        tmp_path_factory.mktemp("exits") / "out", ROWS, model=str(tiny_llama_folder), kept=("kind",),
        run=run_facts(num_tokens(ROWS)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """Full depth's run of all prompts but one: a third of the answers differ, from a token of their own on."""
    rows = []
    for number, row in enumerate(make_rows(60)[1:]):
        tokens = list(row["generated_tokens"])
        if number % 3 == 0:
            tokens = tokens[: number % 7] + [token ^ 1 for token in tokens[number % 7 :]]
        full = [NUM_LAYERS] * len(tokens)
        rows.append({**row, "generated_tokens": tokens, "exit_layers": full, "mean_exit_layer": float(NUM_LAYERS)})
    return write_output(
        tmp_path_factory.mktemp("full") / "full",
        rows,
        model=str(tiny_llama_folder),
        run=run_facts(num_tokens(rows), None, 100.0),
    )


def test_two_runs_are_compared_prompt_by_prompt(out: Path, other: Path) -> None:
    with load([other, out]) as analytics:
        report = make_report(analytics)
        texts = analytics.records("SELECT run, row_id, generated_tokens FROM rows")
    (found,) = report.comparisons
    assert (found["pairs"], found["only_first"], found["only_other"]) == (59, 0, 1)
    by_run: dict[str, dict[str, list[int]]] = {}
    for row in texts:
        by_run.setdefault(row["run"], {})[row["row_id"]] = row["generated_tokens"]
    partings = []
    for row_id, tokens in by_run["full"].items():
        pairs = zip(tokens, by_run["out"][row_id], strict=True)
        partings += [next((n for n, (a, b) in enumerate(pairs) if a != b), None)]
    parted = Counter(at for at in partings if at is not None)
    assert {row["position"]: row["answers"] for row in found["partings"]} == parted
    assert found["same"][0] == pytest.approx(partings.count(None) / 59, abs=1e-5)
    assert median_parting(found["partings"]) == sorted(parted.elements())[math.ceil(parted.total() / 2) - 1]
    depth = found["measures"][0]
    assert depth["first"] == NUM_LAYERS
    mean = sum(row["mean_exit_layer"] for row in ROWS[1:]) / 59
    assert depth["other"] == pytest.approx(mean)
    assert depth["difference"][0] == pytest.approx(mean - NUM_LAYERS, abs=1e-4)
    assert depth["p_value"] < 0.001
    length = next(row for row in found["measures"] if row["name"] == "tokens of an answer")
    assert (length["difference"], length["p_value"]) == ([0, 0, 0], 1.0)
    assert found["speed"]["ratio"] == pytest.approx(1.1)
    time = report.runs[1]["savings"]["time"]
    assert found["speed"]["realised"] == pytest.approx(1.1 / time["bound"])
    assert found["speed"]["realised_of_ceiling"] == pytest.approx(1.1 / time["ceiling"])
    with load([out, other]) as analytics:
        (turned,) = make_report(analytics).comparisons
    assert turned["speed"]["ratio"] == pytest.approx(1 / 1.1)
    assert turned["speed"]["realised"] == pytest.approx(found["speed"]["realised"])
    assert found["conditions"] == []


def test_answers_that_end_earlier_part_where_they_end(tmp_path: Path) -> None:
    rows = make_rows(2)
    longer = [
        {**row, **{name: [*row[name], 4] for name in ("generated_tokens", "exit_layers", "token_times_us")}}
        for row in rows
    ]
    write_output(tmp_path / "a", rows)
    write_output(tmp_path / "b", longer)
    with load([tmp_path / "a", tmp_path / "b"]) as analytics:
        (found,) = make_report(analytics).comparisons
    assert sorted(row["position"] for row in found["partings"]) == sorted({len(row["exit_layers"]) for row in rows})


def test_the_command_prints_a_summary_and_writes_the_page(out: Path, other: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(other), str(out), "--output", str(page), "--category", "nothing"])
    assert done.exit_code == 2
    assert done.stderr == "error: category: no column kept from the input, got 'nothing'; there are: kind\n"
    done = CliRunner().invoke(app, ["report", str(other), str(out), "--output", str(page)], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    for text in (
        "tokens that left early",
        "out: tokens by depth",
        "prompt by prompt",
        "identical",
        "ceiling",
        str(page),
    ):
        assert text in " ".join(done.stdout.split()), text
    assert Page(page).text.count("Slowest rows") == 2
    assert Page(page).text.count("Who leaves early") == 1, "nobody at full depth"
    for file, message in (
        (str(tmp_path / "no" / "page.html"), "error: output: cannot write"),
        ("~nobody-of-that-name/page.html", "error: output: no such home, got"),
    ):
        done = CliRunner().invoke(app, ["report", str(out), "--output", file])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith(message)


def test_the_entry_point_for_a_cluster_is_the_command(tmp_path: Path) -> None:
    program = Path(__file__).parents[2] / "jobs" / "report.py"
    done = subprocess.run(
        [sys.executable, program, tmp_path], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (2, f"error: output: no job in {str(tmp_path)!r}\n")
