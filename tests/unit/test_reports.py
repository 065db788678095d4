"""What actors report and what the job makes of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tide_ray.data import reports as reports_module
from tide_ray.data.ledger import DeathLedger
from tide_ray.data.reports import Reporter, Reports
from tide_ray.data.run_facts import prefix_hit_rate
from tide_ray.types import UserError


def batch(rows: int, tokens: int) -> dict[str, int]:
    return {"rows": rows, "errors": 0, "tokens": tokens, "depths": 30 * tokens}


def test_the_job_sums_all_actors_and_counts_time_from_first_rows_to_last_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([10.0, 12.0, 15.0, 19.0])
    monkeypatch.setattr(reports_module, "time", SimpleNamespace(time=lambda: next(times)))
    first, second = (Reporter(str(tmp_path / "reports"), name) for name in ("a", "b"))
    for reporter in (first, second):
        reporter.engine_started({"model": "demo", "device": "cpu", "max_num_seqs": 8}, 4.5, node="n1")
        reporter.rows_arrived(2)
    first.rows_arrived(3)  # later rows do not start the clock again
    first.batch_done(batch(2, 50), {"num_steps": 7, "launches": {"full": 7}}, None, {"peak_rss_bytes": 900})
    second.batch_done(
        batch(3, 70), {"num_steps": 5, "launches": {"full": 5}}, {"boundaries_on": [True]}, {"peak_rss_bytes": 800}
    )

    reports = Reports(str(tmp_path / "reports"))

    assert reports.totals() == {
        "started": 7, "rows": 5, "errors": 0, "tokens": 120, "depths": 3600, "engines": 2, "seconds": 9.0
    }  # fmt: skip
    assert reports.counters() == {"num_steps": 12, "launches": {"full": 12}}
    assert reports.engine_facts()["model"] == "demo"
    assert reports.final_exits() == [{"actor": "b", "boundaries_on": [True]}]
    assert reports.num_actors() == 2
    common = {"node": "n1", "startup_seconds": 4.5, "device": "cpu", "max_num_seqs": 8}
    unknown = dict.fromkeys(("device_name", "num_threads", "max_model_len", "num_kv_pages"))
    assert reports.processes() == [
        {"actor": "a", **common, **unknown, "peak_rss_bytes": 900, "rows": 2, "tokens": 50},
        {"actor": "b", **common, **unknown, "peak_rss_bytes": 800, "rows": 3, "tokens": 70},
    ]
    assert reports.failure() is None


def test_an_actor_whose_process_was_replaced_is_one_actor_and_unlike_ones_are_told_apart(tmp_path: Path) -> None:
    for name, actor, threads in (("1", "x", 4), ("2", "x", 2), ("3", "y", 8), ("4", "never up", 0)):
        reporter = Reporter(str(tmp_path), name, actor=actor)
        if threads:
            reporter.engine_started({"num_threads": threads}, 1.0)
    reports = Reports(str(tmp_path))
    assert reports.num_actors() == 2
    assert [(one["actor"], one["num_threads"]) for one in reports.processes()] == [("x", 4), ("x", 2), ("y", 8)]


def test_answers_in_several_dtypes_are_refused(tmp_path: Path) -> None:
    for name, dtype in (("1", "bfloat16"), ("2", "bfloat16"), ("3", "float16")):
        Reports(str(tmp_path)).check_dtypes()
        Reporter(str(tmp_path), name).engine_started({"dtype": dtype}, 1.0)
    with pytest.raises(UserError, match="dtype: auto is bfloat16 on some nodes, float16 on others; name one"):
        Reports(str(tmp_path)).check_dtypes()


def test_counters_are_the_engines_own_since_its_start_and_are_not_added_up_over_batches(tmp_path: Path) -> None:
    reporter = Reporter(str(tmp_path), "a")
    reporter.batch_done(batch(1, 10), {"num_steps": 4}, None, {})
    reporter.batch_done(batch(1, 10), {"num_steps": 9}, None, {})
    assert Reports(str(tmp_path)).counters() == {"num_steps": 9}
    assert Reports(str(tmp_path)).totals()["tokens"] == 20


def test_the_first_failure_is_the_one_that_is_told(tmp_path: Path) -> None:
    second, first = (Reporter(str(tmp_path), name) for name in ("a", "b"))
    first.failed("model: no such folder", True)
    second.failed("a consequence", False)
    first.failed("a later one of the same actor", False)
    assert Reports(str(tmp_path)).failure() == ("model: no such folder", True)


def test_before_any_actor_is_up_there_is_nothing_to_tell(tmp_path: Path) -> None:
    reports = Reports(str(tmp_path / "not made yet"))
    assert reports.totals()["engines"] == 0
    assert reports.failure() is None
    assert reports.engine_facts() == {}


def test_the_hit_rate_is_that_of_all_prompt_tokens_and_nothing_without_any() -> None:
    assert prefix_hit_rate({"num_prompt_tokens": 400, "num_cached_tokens": 150}) == 0.375
    assert prefix_hit_rate({"num_prompt_tokens": 0, "num_cached_tokens": 0}) == prefix_hit_rate({}) == 0.0


def test_an_actor_that_starts_after_its_attempt_is_over_does_not_bring_the_folder_back(tmp_path: Path) -> None:
    """The folder would let a writer that outlived its job commit rows that the next attempt generates as well."""
    scratch = tmp_path / "_tmp" / "attempt"
    with pytest.raises(FileNotFoundError):
        Reporter(str(scratch / "reports"), "a")
    with pytest.raises(FileNotFoundError):
        DeathLedger(str(scratch / "running"))
    assert list(tmp_path.iterdir()) == []
