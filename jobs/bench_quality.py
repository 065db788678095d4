"""What exits cost in quality, by replaying the model's own answers with K/V of exits in place; nothing is timed.

Agreement is with full depth's top-1 after the same tokens. ``prompt``: all prompt tokens but the first and the last
stop at the boundary. ``half``: a random half of the generated tokens stop there, the others are judged. ``exits``:
tokens stop where the checkpoint's gate says so at a calibrated error. ``prefill``: a share of the prompt tokens stops,
chosen at random, by the prefill gate, by their true damage (K/V error times the answer's attention: the oracle), or the
earliest first; ``recovered`` is how far the gate gets from random to the oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from bench_workload import Workload
from torch import Tensor

from tide_ray import EngineConfig, TideEngine
from tide_ray.calibrate.choice import gate_stops
from tide_ray.calibrate.corpus import Example, answered
from tide_ray.calibrate.fitting import block_scales
from tide_ray.calibrate.judge import kv_damages, kv_errors
from tide_ray.calibrate.replay import Replay, Replayed, ReplayRows
from tide_ray.calibrate.trace import MAX_ROWS, Tracer
from tide_ray.exits.checkpoint import Boundary, Routers
from tide_ray.exits.policies import Scorer
from tide_ray.exits.readouts import kv_width
from tide_ray.exits.rotary import find_rotary
from tide_ray.models import load
from tide_ray.models.adapter import Adapter

KV_POLICIES = ("copy", "fitted", "deferred")


def run_quality(
    workload: Workload, checkpoint: str, *, shares: Sequence[float], tail: int, num_threads: int
) -> dict[str, Any]:
    """Measure every boundary of a checkpoint by itself; returns the facts that are printed and written.

    Args:
        shares: of the prompt tokens that stop in ``prefill``.
        tail: last prompt tokens that never stop in ``prefill``.
    """
    torch.set_num_threads(num_threads)
    routers = Routers.load(checkpoint)
    loaded = load(workload.model, dtype=workload.dtype)
    prompts = workload.token_ids(loaded)
    limit = max(map(len, prompts)) + workload.max_tokens
    config = EngineConfig(max_num_seqs=64, max_model_len=limit, kv_memory_fraction=0.2, prefix_caching=False)
    engine = TideEngine(loaded, config)
    examples = [example for _, example in answered(engine, prompts, workload.max_tokens)]
    examples.sort(key=lambda example: len(example.token_ids))
    engine.runner.pools.release()
    bench = _Bench(engine.runner.adapter, examples, tail)
    boundaries = [b.ready(engine.runner.adapter.device, engine.runner.adapter.dtype) for b in routers.boundaries]
    tracer = Tracer(engine.runner.adapter, engine.runner.pools, bench.kinds, list(routers.depths))
    damages = bench.damages(tracer, boundaries)
    return {
        "model": workload.model,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "prompts": len(examples),
        "sources": workload.sources,
        "mean_prompt_tokens": round(float(np.mean([e.first_judged + 1 for e in examples])), 1),
        "judged_tokens": len(bench.full.choices),
        "calibrated_on": routers.facts.training.get("prompts"),
        "prefill_tail": tail,
        **bench.floors(),
        "boundaries": [
            {
                "depth": boundary.depth,
                **bench.kv_policies(boundary),
                "prefill": [bench.prefill(boundary, damages[boundary.depth], share) for share in shares],
            }
            for boundary in boundaries
        ],
    }


class _Bench:
    def __init__(self, adapter: Adapter, examples: Sequence[Example], tail: int) -> None:
        self.adapter = adapter
        self.examples = examples
        self.kinds = find_rotary(adapter)
        self._longest = max(len(example.token_ids) for example in examples)
        self.full = self._replay([]).run(examples)
        lengths = [len(example.token_ids) for example in examples]
        self._positions = np.concatenate([np.arange(length) for length in lengths])
        self._ends = np.repeat([example.first_judged for example in examples], lengths)
        self._may_stop = (self._positions > 0) & (self._positions <= self._ends - tail)
        self._draws = np.random.default_rng(0).random(len(self._positions))

    def floors(self) -> dict[str, float]:
        """Full depth against itself: in smaller launches, and as the engine chose it while it generated."""
        smaller = self._replay([], rows_per_launch=max(self._longest, MAX_ROWS // 4)).run(self.examples)
        # The last token of an answer is not in its example, so its choice has nothing to be compared with.
        last = np.cumsum([len(e.token_ids) - e.first_judged for e in self.examples]) - 1
        chosen = np.concatenate([[*e.token_ids[e.first_judged + 1 :], -1] for e in self.examples])
        has_token = np.ones(len(chosen), dtype=bool)
        has_token[last] = False
        generated = float((chosen == self.full.choices)[has_token].mean())
        return {"floor_launches": _r(smaller.agreement(self.full)), "floor_generation": _r(generated)}

    def kv_policies(self, boundary: Boundary) -> dict[str, Any]:
        """Agreement under each KV policy."""
        scorer = Scorer([boundary], self.adapter.final_norm, self.adapter.head)
        facts: dict[str, Any] = {"prompt": {}, "half": {}, "exits": {}}
        for kv_policy in KV_POLICIES:
            replay = self._replay([boundary], kv_policy=kv_policy)
            if kv_policy != "deferred":  # its prompt rows run every layer
                stopped = replay.run(self.examples, lambda _b, _s, rows: rows.is_prompt & (rows.positions > 0))
                facts["prompt"][kv_policy] = _r(stopped.agreement(self.full))
            halved = replay.run(self.examples, lambda _b, _s, rows: rows.is_generated & self._is_drawn(rows))
            facts["half"][kv_policy] = _r(self._agreement_of_the_others(halved))
            for level, threshold in boundary.thresholds.items():
                exited = replay.run(self.examples, gate_stops(scorer, [threshold]))
                entry = facts["exits"].setdefault(level, {"share": _r(np.mean(exited.depths == boundary.depth))})
                entry[kv_policy] = _r(exited.agreement(self.full))
        return facts

    def prefill(self, boundary: Boundary, damages: np.ndarray, share: float) -> dict[str, float | None]:
        """Agreement when ``share`` of all prompt tokens stops, by who chooses them."""
        orders = {
            "random": self._draws,
            "gate": self._predicted_damages(boundary),
            "oracle": damages,
            "earliest": self._positions - self._ends,
        }
        count = min(round(share * float((self._positions <= self._ends).sum())), int(self._may_stop.sum()))
        facts: dict[str, float] = {"share": share}
        for name, order in orders.items():
            chosen = np.zeros(len(order), dtype=bool)
            candidates = np.flatnonzero(self._may_stop)
            chosen[candidates[np.argsort(order[candidates], kind="stable")[:count]]] = True
            stopped = self._replay([boundary]).run(self.examples, partial(_as_chosen, chosen))
            facts[name] = _r(stopped.agreement(self.full))
        gap = facts["oracle"] - facts["random"]
        return {**facts, "recovered": _r((facts["gate"] - facts["random"]) / gap) if gap > 0 else None}

    @torch.inference_mode()
    def damages(self, tracer: Tracer, boundaries: Sequence[Boundary]) -> dict[int, np.ndarray]:
        """What every row would really cost later tokens if it stopped, at every boundary."""
        shapes = {b.depth: self.adapter.kv_shapes[b.depth :] for b in boundaries}
        totals, num_rows = torch.zeros(kv_width(shapes[boundaries[0].depth])), 0
        for rows in tracer.trace(self.examples):
            assert rows.keys_values is not None
            totals += rows.keys_values.square().sum(0).cpu()
            num_rows += len(rows.keys_values)
        scales = {
            d: block_scales(totals[-kv_width(s) :] / num_rows, s).to(self.adapter.device) for d, s in shapes.items()
        }
        parts: dict[int, list[np.ndarray]] = {depth: [] for depth in shapes}
        for rows in tracer.trace(self.examples, with_attention=True):
            assert rows.keys_values is not None
            assert rows.attention is not None
            for boundary in boundaries:
                assert boundary.kv_head is not None
                depth, scale = boundary.depth, scales[boundary.depth]
                actual = rows.keys_values[:, -len(scale) :]
                found = kv_errors(boundary.kv_head, rows.states[depth], actual, scale, shapes[depth])
                parts[depth].append(kv_damages(found, rows.attention).cpu().numpy())
        return {depth: np.concatenate(found) for depth, found in parts.items()}

    def _predicted_damages(self, boundary: Boundary) -> np.ndarray:
        predicted = np.zeros(len(self._positions))

        def note(_boundary: int, states: Tensor, rows: ReplayRows) -> np.ndarray:
            assert boundary.prefill_gate is not None
            at, of = (torch.from_numpy(a).to(states.device) for a in (rows.positions, rows.first_judged + 1))
            predicted[rows.row_numbers] = boundary.prefill_gate.damages(states, at, of).cpu().numpy()
            return np.zeros(len(states), dtype=bool)

        self._replay([boundary]).run(self.examples, note)
        return predicted

    def _is_drawn(self, rows: ReplayRows) -> np.ndarray:
        drawn: np.ndarray = self._draws[rows.row_numbers] < 0.5
        return drawn

    def _agreement_of_the_others(self, replayed: Replayed) -> float:
        others = replayed.depths == self.adapter.num_layers
        return float((replayed.choices == self.full.choices)[others].mean())

    def _replay(
        self, boundaries: Sequence[Boundary], *, kv_policy: str = "fitted", rows_per_launch: int = MAX_ROWS
    ) -> Replay:
        return Replay(
            self.adapter,
            boundaries,
            self.kinds,
            kv_policy=kv_policy,
            longest=self._longest,
            rows_per_launch=rows_per_launch,
        )


def _as_chosen(chosen: np.ndarray, _boundary: int, _states: Tensor, rows: ReplayRows) -> np.ndarray:
    stops: np.ndarray = chosen[rows.row_numbers]
    return stops


def _r(value: Any) -> float:
    return round(float(value), 4)
