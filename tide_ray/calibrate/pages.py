"""Reports of calibration, sweeps and evaluation as pages."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tide_ray.calibrate import figures
from tide_ray.calibrate.report import MIN_CEILING, baselines_words, best_boundary, screened_out_words, verdict
from tide_ray.calibrate.sweep_config import PAGE_FILE
from tide_ray.calibrate.tables import (
    candidates_table,
    certificates_table,
    evaluation_table,
    kv_policies_table,
    sweep_table,
)
from tide_ray.exits.checkpoint import Routers
from tide_ray.pages.drawing import data_uri
from tide_ray.pages.page import write_page


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write the report of the checkpoint in ``folder``, as it is now, beside it. Returns the file.

    Raises:
        UserError: the folder is no checkpoint.
    """
    routers = Routers.load(folder)
    return _write(Path(folder) / PAGE_FILE, "report.html", report_facts(routers))


def report_facts(routers: Routers) -> dict[str, Any]:
    """What the page of a checkpoint is made of; what an imported or an older one does not know is left out."""
    facts, metrics = routers.facts, routers.facts.metrics
    candidates = metrics.get("candidates", [])
    training = facts.training
    page: dict[str, Any] = {
        "model": training.get("settings", {}).get("model", facts.model_fingerprint),
        "facts": {
            "revision": facts.revision,
            "dtype": facts.dtype,
            "layers": facts.num_layers,
            "boundaries": ", ".join(map(str, routers.depths)),
            "K/V policy": facts.kv_policy,
            "calibrated on": training.get("source", "unknown"),
            "prompts": ", ".join(f"{name} {num:,}" for name, num in training.get("prompts", {}).items()),
            "tokens": f"{training['tokens']:,}" if "tokens" in training else "",
            "seconds": ", ".join(f"{name} {value:.0f}" for name, value in metrics.get("seconds", {}).items()),
            "checkpoint": routers.identity,
        },
        "settings": json.dumps(training.get("settings", {}), indent=2),
        "certificates": routers.certificates,
        **dict.fromkeys(("certified", "candidates", "reliability", "coverage", "kv_policies")),
    }
    if routers.certificates:
        page["certified"] = certificates_table(routers.certificates, len(routers.certification.get("tested", [])))
    if candidates:
        best, level = best_boundary(metrics, routers.depths)
        profile = figures.depth_profile(metrics.get("profile", {}), candidates)
        page |= {
            "candidates": candidates_table(candidates, routers.depths),
            "screened_out": screened_out_words(metrics),
            "verdict": verdict(metrics, routers.depths),
            "is_poor": best["exits"][level]["ceiling"] < MIN_CEILING,
            "depth_profile": data_uri(profile),
        }
    if candidates and "reliability" in candidates[0]:
        page["reliability"] = data_uri(figures.reliability(candidates))
        page["coverage"] = data_uri(figures.coverage(candidates))
    if "kv_policies" in metrics:
        page["kv_policies"] = kv_policies_table(metrics["kv_policies"])
    return page


def write_sweep_page(folder: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the page that compares the models of a sweep. ``rows``: as in ``sweep.json``. Returns the file."""
    done = [row for row in rows if "exit_share" in row]
    page = {
        "table": sweep_table(rows),
        "figure": data_uri(figures.agreement_of_models(done)) if done else None,
        "models": [{**row, "link": f"{quote(str(row['name']))}/{PAGE_FILE}"} for row in done],
        "failed": [row for row in rows if row.get("error")],
    }
    return _write(Path(folder) / PAGE_FILE, "sweep.html", page)


def write_evaluation_page(file: str | os.PathLike[str], facts: Mapping[str, Any]) -> Path:
    """Write the table of an evaluation and its plot, quality against realised speed. Returns the file."""
    page = {
        "table": evaluation_table(facts),
        "baselines": baselines_words(facts),
        "figure": data_uri(figures.quality_and_speed(facts["variants"])),
        "facts": facts,
    }
    return _write(Path(file), "evaluation.html", page)


def _write(file: Path, template: str, page: Mapping[str, Any]) -> Path:
    return write_page(file, "tide_ray.calibrate", template, page)
