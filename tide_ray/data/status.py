"""``tide-ray status``: how far the job in an output folder is, from its files alone."""

from __future__ import annotations

from typing import Any

from tide_ray.data.job_folder import TMP_FOLDER, JobFolder
from tide_ray.data.lock import live_owner
from tide_ray.data.reports import Reports
from tide_ray.data.storage import StoragePath


def job_status(output: str | StoragePath) -> dict[str, Any]:
    """State (``finished``, ``running`` or ``stopped``), row counts, and for a running job its owner and speed.

    Raises:
        UserError: ``output`` holds no job.
        UnavailableError: the object store stopped answering.
    """
    folder = JobFolder.existing(output)
    num_rows = folder.fields()["input_rows"]
    counts = folder.finished()
    owner = live_owner(folder.path)
    committed = folder.committed()
    status: dict[str, Any] = {
        "state": "finished" if counts is not None else "running" if owner is not None else "stopped",
        "rows": num_rows,
        "results": len(committed.data),
        "errors": len(committed.errors),
        "left": num_rows - committed.num_ids,
    }
    if counts is not None or owner is None:
        return status
    reports = Reports(str(folder.path / TMP_FOLDER / owner["attempt"] / "reports"))
    totals = reports.totals()
    seconds = totals["seconds"]
    status |= {name: owner[name] for name in ("attempt", "host", "pid")} | {"since": owner["time"]}
    status |= {"engines": totals["engines"], "rows_per_second": 0.0}
    if seconds:
        rate = totals["rows"] / seconds
        status |= {
            "rows_per_second": round(rate, 2),
            "tokens_per_second": round(totals["tokens"] / seconds, 1),
            "seconds_left": round(status["left"] / rate) if rate else None,
        }
    return status


def status_lines(status: dict[str, Any]) -> list[str]:
    """The status for people to read."""
    done = status["results"] + status["errors"]
    share = done / status["rows"] if status["rows"] else 1.0
    lines = [
        f"{status['state']}: {done:,} of {status['rows']:,} rows ({share:.0%}), "
        f"{status['errors']:,} of them rejected, {status['left']:,} left"
    ]
    if "pid" in status:
        lines.append(
            f"attempt {status['attempt']}: process {status['pid']} on {status['host']} since {status['since']}"
        )
        lines.append(f"{status['engines']} engines, {status['rows_per_second']:,.1f} rows/s")
    if status.get("seconds_left") is not None:
        lines[-1] += f", {status['tokens_per_second']:,.0f} tokens/s, about {status['seconds_left']:,} s to go"
    return lines
