"""One calibration: examples in, boundaries and their figures out.

Three passes over disjoint prompts: ``fit`` gives exit heads and KV heads from streamed sums, ``gate`` trains the gates,
``calibrate`` turns their scores into probabilities and thresholds; ``test`` is only measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tide_ray.calibrate.choice import (
    MAX_REPLAYED,
    BoundarySet,
    SetReplay,
    best_set,
    is_acceptable,
    promising_sets,
)
from tide_ray.calibrate.config import CalibrationConfig
from tide_ray.calibrate.corpus import Example, Progress, Splits, leading
from tide_ray.calibrate.fitting import Fitted, Fitter
from tide_ray.calibrate.gate_training import calibrate_scores, threshold_at, train_gate
from tide_ray.calibrate.judge import Judge, Judged
from tide_ray.calibrate.kv_quality import kv_quality
from tide_ray.calibrate.measures import ERROR_LEVELS, depth_metrics
from tide_ray.calibrate.profile import depth_profile
from tide_ray.calibrate.statistics import FitStatistics
from tide_ray.calibrate.sureness import Sureness
from tide_ray.calibrate.trace import Tracer
from tide_ray.engine.engine import TideEngine
from tide_ray.engine.memory import return_freed_memory
from tide_ray.exits.checkpoint import Boundary
from tide_ray.exits.gates import Gate, PrefillGate, places
from tide_ray.exits.rotary import Rotary, find_rotary

MAX_FITTED = 32_768
"""Rows that exit heads are fitted on, held-out ones included: beyond it they gain less than prompts differ."""
MAX_JUDGED = {"gate": 16_384, "calibrate": 8192, "test": 6144}
"""Rows of each other split: they are read through all heads, which costs more than computing them."""
MAX_PROMPT = {"gate": 8192, "calibrate": 4096, "test": 0}
"""Prompt rows of each: prefill gates start from a good guess, and their figures are not part of the report."""
_Choice = tuple[list[Boundary], dict[str, Any]]
Collect = Callable[[Fitter, Sequence[Example]], FitStatistics]


class Calibration:
    """One calibration run.

    Args:
        engine: of the model to calibrate, without exits.
        depths: candidate boundaries, rising. Once the exit heads are fitted, those that are worth more work.
    """

    def __init__(
        self, engine: TideEngine, config: CalibrationConfig, depths: Sequence[int], progress: Progress
    ) -> None:
        self.config = config
        self.depths = list(depths)
        self.adapter = engine.runner.adapter
        self.kinds: list[Rotary] | None = find_rotary(self.adapter)
        self.kv_policy = config.kv_policy if self.kinds is not None or config.kv_policy != "fitted" else "copy"
        self.pools = engine.runner.pools
        self.progress = progress
        self.seconds: dict[str, float] = {}

    def fitter(self) -> Fitter:
        return Fitter(
            self.adapter, self._tracer(), self.depths, self.config, self.progress, fits_kv=self.kinds is not None
        )

    def run(self, splits: Splits, collect: Collect) -> tuple[list[Boundary], dict[str, Any]]:
        """Boundaries ready to be saved, and metrics of every candidate."""
        with self._timed("fit"):
            fitter = self.fitter()
            fitted = fitter.fit(collect(fitter, fitting_examples(splits)))
            self.depths = fitted.depths
            return_freed_memory()
        with self._timed("judge"):
            heads = fitter.ready(fitted.heads)
            judge = Judge(self.adapter, self._tracer(), heads, fitter.ready(fitted.kv_heads), fitted.kv_scales)
            judged = {}
            for number, name in enumerate(MAX_JUDGED):
                self.progress(f"judging the {name} split", number / 3)
                judged[name] = judge.judge(
                    leading(splits[name], MAX_JUDGED[name]),
                    max_rows=MAX_JUDGED[name],
                    max_prompt_rows=MAX_PROMPT[name],
                    seed=self.config.seed + number,
                    for_report=name == "test",
                )
        with self._timed("gates"):
            sureness = Sureness(self.adapter, heads, fitted.shortlist)
            candidates = [self._boundary(depth, fitted, judged, sureness) for depth in self.depths]
        metrics = [
            depth_metrics(b, sureness.scores(b, judged["test"]), judged["test"], self.depths, self.adapter.num_layers)
            for b in candidates
        ]
        scores = [sureness.scores(b, judged["calibrate"]) for b in candidates]
        with self._timed("choice"):
            chosen, comparison = self._choose(candidates, scores, splits)
        with self._timed("report"):
            self.progress("what K/V policies cost", 0.0)
            comparison["profile"] = depth_profile(self.adapter, self.pools, splits["test"])
            comparison["kv_policies"] = kv_quality(self.adapter, self.kinds, chosen, splits["test"])
        facts = {
            **comparison,
            "candidates": metrics,
            "fit": fitted.facts,
            "seconds": {name: round(seconds, 2) for name, seconds in self.seconds.items()},
            "screened": {str(depth): round(saving, 4) for depth, saving in fitted.savings.items()},
            "rows": {"fit": fitted.num_rows, **{name: one.rows.num_rows for name, one in judged.items()}},
        }
        return chosen, facts

    def _tracer(self) -> Tracer:
        return Tracer(self.adapter, self.pools, self.kinds, self.depths)

    # ---- gates ----

    def _boundary(self, depth: int, fitted: Fitted, judged: dict[str, Judged], sureness: Sureness) -> Boundary:
        self.progress(f"training the gate at depth {depth}", self.depths.index(depth) / len(self.depths))
        train, held = judged["gate"], judged["calibrate"]
        states, features = train.rows.take(f"state_{depth}"), sureness.features(depth, train)
        has_shortlist = features is not None
        gate = train_gate(
            states,
            torch.from_numpy(train.lasting(depth, self.depths)).float(),
            train.rows.take("sequence"),
            make=lambda: Gate(states.shape[1], self.config.bottleneck, num_tokens=int(has_shortlist)),
            seed=self.config.seed,
            is_balanced=True,
            features=features,
        )
        sureness.give_shortlist(gate)
        boundary = Boundary(depth, fitted.heads[depth], gate, fitted.kv_heads.get(depth))
        right = held.right(depth)
        calibrate_scores(gate, sureness.logits(boundary, held), torch.from_numpy(held.lasting(depth, self.depths)))
        scores = sureness.scores(boundary, held)
        boundary.thresholds = {str(level): threshold_at(scores, right, level) for level in ERROR_LEVELS}
        boundary.score_quantiles = _percentiles(torch.from_numpy(scores))
        if boundary.kv_head is not None and train.prompt_rows.num_rows and held.prompt_rows.num_rows:
            boundary.prefill_gate = self._prefill_gate(depth, train)
            rows = held.prompt_rows
            states, positions, lengths = (rows.take(name) for name in (f"state_{depth}", "position", "length"))
            with torch.no_grad():
                boundary.prefill_quantiles = _percentiles(boundary.prefill_gate.damages(states, positions, lengths))
        return boundary

    def _prefill_gate(self, depth: int, train: Judged) -> PrefillGate:
        """The unit of damage is its mean at the deepest candidate."""
        rows = train.prompt_rows
        damages = rows.take(f"damage_{depth}") / rows.take(f"damage_{self.depths[-1]}").mean()
        states, where = rows.take(f"state_{depth}"), places(rows.take("position"), rows.take("length"))
        return train_gate(
            states,
            damages / (1 + damages),
            rows.take("sequence"),
            make=lambda: PrefillGate(states.shape[1], self.config.bottleneck).start_from(where, damages),
            seed=self.config.seed,
            is_balanced=False,
            features=where,
        )

    def _choose(self, candidates: Sequence[Boundary], scores: Sequence[np.ndarray], splits: Splits) -> _Choice:
        """The boundaries asked for, else the most promising set that is acceptable; with the figures of those replayed.

        Sets come in the order of their saving, so the first acceptable one is the best.
        """
        if self.config.boundaries:
            return list(candidates), {}
        replay = SetReplay(self.adapter, self.kinds, splits["calibrate"], kv_policy=self.kv_policy)
        replayed: list[BoundarySet] = []
        for one in promising_sets(candidates, scores, self.adapter.num_layers)[:MAX_REPLAYED]:
            self.progress("comparing sets of boundaries", len(replayed) / MAX_REPLAYED)
            disagreement = replay.disagreement([candidates[n] for n in one.numbers])
            replayed.append(replace(one, disagreement=disagreement))
            if is_acceptable(replayed[-1]):
                break
        best = best_set(replayed)
        figures = [
            {
                "depths": [candidates[n].depth for n in one.numbers],
                "saving": round(one.saving, 4),
                "disagreement": round(one.disagreement or 0.0, 4),
            }
            for one in replayed
        ]
        return [candidates[n] for n in best.numbers], {"noise_floor": round(replay.noise_floor, 4), "sets": figures}

    def _timed(self, name: str) -> _Timer:
        return _Timer(self.seconds, name)


class _Timer:
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = time.perf_counter() - self._start


def _percentiles(values: Tensor) -> tuple[float, ...]:
    return tuple(torch.quantile(values.float(), torch.linspace(0, 1, 101)).tolist())


def fitting_examples(splits: Splits) -> list[Example]:
    """Those that exit heads and KV heads are fitted on."""
    return leading(splits["fit"], MAX_FITTED)
