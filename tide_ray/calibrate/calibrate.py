"""Calibrates routers for one model: its own answers in, a router checkpoint out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tide_ray.calibrate.calibration import Calibration, Collect
from tide_ray.calibrate.config import CalibrationConfig
from tide_ray.calibrate.corpus import Example, Progress, answers, split
from tide_ray.calibrate.fitting import Fitter
from tide_ray.calibrate.statistics import FitStatistics
from tide_ray.config import EngineConfig
from tide_ray.engine.engine import TideEngine
from tide_ray.engine.memory import return_freed_memory
from tide_ray.exits.checkpoint import Routers, as_facts, fingerprint_of
from tide_ray.exits.checkpoint_files import check_output_folder
from tide_ray.models.loading import load_as
from tide_ray.types import UserError

CANDIDATES = (0.4, 0.53, 0.67, 0.8, 0.87, 0.93)
"""Depths compared, as shares of the model's layers."""
LABEL = "top-1 equals full depth's, here and at every later candidate"


def candidate_depths(num_layers: int, asked: Sequence[int]) -> list[int]:
    """The depths to compare: those asked for, else spread over the deeper part of the model.

    Raises:
        UserError: a depth at which no layer is left to skip.
    """
    for depth in asked:
        if not 1 <= depth < num_layers:
            raise UserError(f"boundaries must be from 1 to {num_layers - 1}, got {depth}")
    return sorted(set(asked) or {min(max(1, round(share * num_layers)), num_layers - 1) for share in CANDIDATES})


def calibrate(config: CalibrationConfig, progress: Progress = lambda _what, _share: None) -> Routers:
    """Run a calibration and save its checkpoint in ``config.output``.

    Raises:
        UserError: something in ``config`` cannot be used.
    """
    check_output_folder(Path(config.output))
    started = time.perf_counter()
    progress("loading the model", 0.0)
    engine = open_engine(config)
    examples = answers(config, engine, progress)
    # Whole sequences attend within their launch, so what generation left in the pages is not needed any more.
    engine.runner.pools.release()
    return_freed_memory()
    before = {"generate": time.perf_counter() - started}
    routers = make_routers(new_calibration(config, engine, progress), engine, examples, before)
    routers.save(config.output)
    return routers


def open_engine(config: CalibrationConfig, **settings: Any) -> TideEngine:
    """The engine of the model to calibrate; ``settings`` are further ones of ``EngineConfig``.

    Raises:
        UserError: the model cannot be run, or a boundary is not inside it.
    """
    loaded = load_as(config.model, config)
    engine = TideEngine(loaded, EngineConfig(num_threads=config.num_threads, prefix_caching=False, **settings))
    candidate_depths(engine.num_layers, config.boundaries)
    return engine


def new_calibration(config: CalibrationConfig, engine: TideEngine, progress: Progress) -> Calibration:
    return Calibration(engine, config, candidate_depths(engine.num_layers, config.boundaries), progress)


def collect_all(fitter: Fitter, examples: Sequence[Example]) -> FitStatistics:
    """The statistics of all ``examples``."""
    statistics = fitter.new_statistics()
    fitter.collect(statistics, examples, 0, len(examples))
    return statistics


def make_routers(
    calibration: Calibration,
    engine: TideEngine,
    examples: Sequence[Example],
    seconds_before: Mapping[str, float],
    collect: Collect = collect_all,
) -> Routers:
    """Everything after the answers: routers with their facts, not yet saved.

    Args:
        examples: in an order that depends on the prompts alone.
        seconds_before: what was spent before, by its name in the report.
        collect: has the statistics of the examples that are fitted on.
    """
    started = time.perf_counter()
    config, adapter = calibration.config, calibration.adapter
    splits = split(examples, config.seed)
    boundaries, metrics = calibration.run(splits, collect)
    seconds = {name: round(value, 2) for name, value in seconds_before.items()}
    for name, value in metrics["seconds"].items():
        seconds[name] = round(seconds.get(name, 0.0) + value, 2)
    seconds["total"] = round(sum(seconds_before.values()) + time.perf_counter() - started, 2)
    fingerprint = fingerprint_of(
        engine.model,
        kv_policy=calibration.kv_policy,
        num_layers=adapter.num_layers,
        hidden_size=adapter.config.hidden_size,
    )
    training = {
        "source": "text" if config.text else "own answers",
        "prompts": {name: len(part) for name, part in splits.items()},
        "tokens": sum(len(example.token_ids) for example in examples),
        "settings": config.model_dump(mode="json", exclude={"output"}),
    }
    facts = as_facts(fingerprint, label=LABEL, shapes=adapter.kv_shapes, training=training)
    facts.metrics.update({**metrics, "seconds": seconds})
    return Routers(boundaries, facts)
