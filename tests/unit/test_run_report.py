"""What a report says of runs: every number against plain Python on the same rows; the page is whole and escaped."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from analytics_helpers import COSTS, EXITS, NUM_LAYERS, make_rows, num_tokens, run_facts, write_output
from pages import Page, words
from tide_ray.analytics import load
from tide_ray.analytics.report import make_report, print_report, unknown, write_report
from tide_ray.analytics.savings import savings
from tide_ray.analytics.tables import actors, most_residents, overview_table
from tide_ray.analytics.vocabulary import token_class
from tide_ray.types import UserError
from tiny_models import tiny_tokenizer

ROWS = make_rows(60)
EVIL = "<script>alert(1)</script> & [bold]more"
ERRORS = [
    {"row_id": f"bad-{n}", "stage": "generate", "error": EVIL if n else "rare", "attempts": n, "input": "x"}
    for n in range(4)
]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """Read only."""
    return write_output(
        tmp_path_factory.mktemp("report") / "out", ROWS, model=str(tiny_llama_folder), kept=("kind",), errors=ERRORS,
        run=run_facts(num_tokens(ROWS)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(out: Path) -> dict[str, Any]:
    with load(out) as analytics:
        return make_report(analytics).runs[0]


def by_token(key: Callable[[dict[str, Any], int], Any]) -> dict[Any, dict[int, int]]:
    """Tokens by depth of every value of ``key(row, position)``."""
    found: dict[Any, Counter[int]] = {}
    for row in ROWS:
        for position, depth in enumerate(row["exit_layers"]):
            found.setdefault(key(row, position), Counter())[depth] += 1
    return {name: dict(sorted(counts.items())) for name, counts in found.items()}


def as_dict(groups: list[dict[str, Any]]) -> dict[str, dict[int, int]]:
    return {group["label"]: group["depths"] for group in groups}


def power_of_two(number: int) -> str:
    if number <= 1:
        return str(number)
    first = 1 << (number.bit_length() - 1)
    return f"{first}-{2 * first - 1}"


def test_depths_are_counted_over_all_tokens_and_by_every_group(run: dict[str, Any]) -> None:
    assert {None: run["depths"]} == by_token(lambda _row, _position: None)
    assert as_dict(run["by_position"]) == by_token(lambda _row, position: power_of_two(position))
    assert as_dict(run["by_prompt_length"]) == by_token(lambda row, _position: power_of_two(row["num_input_tokens"]))
    assert as_dict(run["by_category"]["kind"]) == by_token(lambda row, _position: row["kind"] or "(none)")
    tokenizer = tiny_tokenizer()

    def kind(row: dict[str, Any], position: int) -> str:
        token_id = row["generated_tokens"][position]
        is_special = token_id in tokenizer.all_special_ids
        return "special" if is_special else token_class(tokenizer.decode([token_id]))

    assert as_dict(run["by_class"]) == by_token(kind)
    labels = [group["label"] for group in run["by_position"]]
    assert labels == ["0", "1", "2-3", "4-7", "8-15", "16-31", "32-63"]


def test_percentiles_are_times_that_so_many_do_not_exceed(run: dict[str, Any]) -> None:
    times: dict[int, list[int]] = {}
    for row in ROWS:
        for depth, time_us in list(zip(row["exit_layers"], row["token_times_us"], strict=True))[1:]:
            times.setdefault(depth, []).append(time_us)
    first = {0: [row["token_times_us"][0] for row in ROWS]}
    for found, expected in ((run["token_times"], times), ([run["first_token"]], first)):
        assert [row["depth"] for row in found] == sorted(expected)
        for row in found:
            values = sorted(expected[row["depth"]])
            assert row["tokens"] == len(values)
            assert row["mean"] == pytest.approx(sum(values) / len(values))
            for q in (50, 90, 99):
                assert row[f"p{q}"] == values[math.ceil(q / 100 * len(values)) - 1]


def test_over_time_every_token_and_every_resident_second_is_there_once(run: dict[str, Any]) -> None:
    times = run["over_time"]
    ends = [row["finished_at"].timestamp() for row in ROWS]
    resident = [(row["total_time_us"] - row["queue_time_us"]) / 1e6 for row in ROWS]
    spans = [(end - seconds, end) for end, seconds in zip(ends, resident, strict=True)]
    start = min(end - row["total_time_us"] / 1e6 for end, row in zip(ends, ROWS, strict=True))
    assert times["seconds"] == pytest.approx(max(end for _, end in spans) - start)
    width = times["seconds"] / len(times["residents"])
    tokens = sum(row["num_generated_tokens"] for row in ROWS)
    assert sum(times["tokens_per_second"]) * width == pytest.approx(tokens)
    for number, residents in enumerate(times["residents"]):
        a, b = start + number * width, start + (number + 1) * width
        overlap = sum(max(0.0, min(b, end) - max(a, begin)) for begin, end in spans)
        assert residents == pytest.approx(overlap / width, abs=1e-3)


def test_errors_are_grouped_and_the_slowest_rows_listed(run: dict[str, Any]) -> None:
    assert run["num_errors"] == 4
    assert [(row["error"], row["num_rows"], row["attempts"]) for row in run["errors"]] == [(EVIL, 3, 3), ("rare", 1, 0)]
    slowest = sorted(ROWS, key=lambda row: row["queue_time_us"] - row["total_time_us"])[:10]
    assert [row["row_id"] for row in run["slowest"]] == [row["row_id"] for row in slowest]
    assert run["slowest"][0]["first_token_us"] == slowest[0]["token_times_us"][0]


def test_savings_are_layer_runs_and_what_the_cost_model_makes_of_them(run: dict[str, Any]) -> None:
    saved = run["savings"]
    tokens, depths = sum(run["depths"].values()), run["depths"]
    assert saved["answers"]["saved"] == tokens * NUM_LAYERS - sum(depth * count for depth, count in depths.items())
    assert saved["all_rows"] == {"run": 9200, "full": 12000, "saved": 2800, "share": pytest.approx(2800 / 12000)}
    assert [(one["launches"], one["rows_per_launch"]) for one in saved["stages"]] == [
        (300, 10),
        (300, 20 / 3),
        (200, 6),
    ]
    residents = round(tokens / 300)
    assert saved["time"]["residents"] == residents
    spent = [curve(residents) for curve in COSTS.stages]
    reach = [1, 1 - depths[2] / tokens, depths[4] / tokens]
    total = sum(spent) + COSTS.head(residents)
    skipped = sum((1 - share) * seconds for share, seconds in zip(reach, spent, strict=True))
    assert saved["time"]["ceiling"] == pytest.approx(1 / (1 - skipped / total))
    time = saved["time"]
    assert 1 < time["expected"] <= time["bound"] < time["free_bound"] <= time["ceiling"]
    # What full depth takes of a launch of all residents, for as many launches as there are tokens for one resident.
    assert saved["time"]["full_seconds"] == pytest.approx(tokens / residents * total)
    assert saved["time"]["saved_seconds"] == pytest.approx(
        saved["time"]["full_seconds"] * (1 - 1 / saved["time"]["expected"])
    )


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, "the run had no exits"),
        ({"engine": {"exits": {**EXITS, "mode": "verified"}}}, "a mode other than exits"),
        ({"engine": run_facts(4)["engine"]}, "were not measured or not written"),
    ],
)
def test_what_cannot_be_told_of_savings_is_said(facts: dict[str, Any], reason: str) -> None:
    found = savings(facts, {2: 1, 4: 3}, 4)
    assert found["time"] is None
    assert reason in found["why_no_time"]
    assert found["all_rows"] is None
    assert found["stages"] == []
    assert found["answers"]["saved"] == 2


def test_costs_of_one_device_are_not_taken_for_anothers() -> None:
    facts = run_facts(num_tokens(ROWS))
    for devices, is_told in ((("cpu", "cpu"), True), (("cpu", "cuda:0"), False)):
        found = savings({**facts, "actors": [{"device": device} for device in devices]}, {2: 1, 4: 3}, 4)
        assert (found["time"] is not None) == is_told
        assert ("unlike devices" in found["why_no_time"]) != is_told


def test_actors_are_told_as_they_were_and_their_residents_add_up() -> None:
    assert actors({"num_actors": 2}) == "2"
    assert actors({"num_actors": 2, "max_actors": 2, "num_actors_run": 2}) == "2"
    assert actors({"num_actors": 1, "max_actors": 4, "num_actors_run": 3}) == "1 to 4, 3 ran"
    assert actors({}) is None
    assert most_residents({"facts": {"engine": {"max_num_seqs": 8}, "num_actors": 2}}) == 16
    unlike = [{"actor": name, "max_num_seqs": num} for name, num in (("a", 8), ("a", 4), ("b", 32))]
    assert most_residents({"facts": {"engine": {"max_num_seqs": 8}, "num_actors": 2, "actors": unlike}}) == 40


def test_notes_say_what_an_output_does_not_tell(tmp_path: Path) -> None:
    rows = [{**row, "finished_at": None} for row in make_rows(5)]
    rows[0]["token_times_us"] = None
    write_output(tmp_path / "out", rows, model=str(tmp_path / "gone"))
    with load(tmp_path / "out") as analytics:
        report = make_report(analytics)
    text = " ".join(report.notes)
    for words_of_a_note in (
        "token texts are NULL", "not finished", "number of layers is not written", "1 rows have no token times",
        "nothing over time", "counters are not written", "no ceiling, bound or seconds saved",
    ):  # fmt: skip
        assert words_of_a_note in text
    assert report.runs[0]["by_class"] == []
    assert report.runs[0]["over_time"] is None
    assert "ceiling" not in overview_table(report.runs).words
    assert "other.html" not in text
    write_report(tmp_path / "page.html", report)
    print_report(Console(file=io.StringIO()), report)


def test_an_output_without_rows_has_a_report(tmp_path: Path) -> None:
    with load(write_output(tmp_path / "out", [], run={})) as analytics:
        report = make_report(analytics)
    assert "there are no rows" in unknown(report.runs[0])
    write_report(tmp_path / "page.html", report)
    print_report(Console(file=io.StringIO()), report)


def test_the_page_needs_nothing_else_and_runs_nothing_that_a_row_says(tmp_path: Path, tiny_llama_folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    rows = make_rows(3)
    for row in rows:
        ids = tokenizer.encode(EVIL, add_special_tokens=False)
        row |= {"prompt": EVIL, "kind": EVIL, "row_id": EVIL + row["row_id"], "generated_tokens": ids}
        row |= {"exit_layers": [2, 3, 4] * 20, "token_times_us": [7] * 60}
        row |= {name: row[name][: len(ids)] for name in ("exit_layers", "token_times_us")}
        row["num_generated_tokens"] = len(ids)
    rows[0]["kind"] = "other"
    folder = tmp_path / "<b>out & more"
    write_output(
        folder, rows, model=str(tiny_llama_folder), kept=("kind",), errors=ERRORS, run=run_facts(num_tokens(ROWS))
    )
    with load([folder, write_output(tmp_path / "x", rows)]) as analytics:
        report = make_report(analytics)
    page = Page(write_report(tmp_path / "page.html", report))
    page.check_needs_nothing_else()
    assert not {tag for tag, _ in page.tags} & {"b", "script", "bold"}
    assert page.text.count(EVIL) > 5
    shown = [attributes for tag, attributes in page.tags if tag == "span" and "title" in attributes]
    assert shown[0]["title"] == "depth 2 of 4"
    assert "background: rgba(0, 114, 178, " in (shown[0]["style"] or "")
    assert "style" not in shown[2], "full depth has no colour"
    assert any(EVIL[:20] in words(image) for image in page.images()), "categories name themselves in figures"
    printed = io.StringIO()
    print_report(Console(file=printed, width=300), report)
    assert EVIL in printed.getvalue()


def test_a_category_that_was_not_kept_is_refused(out: Path) -> None:
    with load(out) as analytics, pytest.raises(UserError, match="got 'prompt'; there are: kind"):
        make_report(analytics, ["prompt"])
