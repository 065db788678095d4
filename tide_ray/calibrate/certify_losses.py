"""Losses of settings, prompt by prompt.

``tokens``: teacher-forced on full depth's own answers, by replay with exits and their K/V in place; full depth runs in
the same launches, so that what rounding makes of another batch is no loss. ``answers`` and ``task``: the engine
answers by itself under the setting, and whole answers are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tide_ray.calibrate.certify_path import Measured
from tide_ray.calibrate.corpus import Example
from tide_ray.calibrate.replay import Replay, ReplayRows, Stops, nothing_stops
from tide_ray.calibrate.trace import MAX_ROWS
from tide_ray.config import EngineConfig
from tide_ray.engine.engine import TideEngine
from tide_ray.exits.certificates import Certificate, ExitSetting
from tide_ray.exits.checkpoint import Boundary, Routers
from tide_ray.exits.policies import Scorer
from tide_ray.exits.rotary import find_rotary
from tide_ray.models.adapter import Adapter
from tide_ray.models.loading import LoadedModel
from tide_ray.types import SamplingParams

Progress = Callable[[float], None]
TaskLoss = Callable[[list[int], list[int]], float]
"""Tokens of a prompt and of an answer to it -> the answer's loss, in [0, 1]."""


class TokenLosses:
    """Share of a prompt's answer tokens where a setting's choice is not full depth's.

    Args:
        boundaries: ready for inference.
        prefill_tail: last tokens of a prompt that never stop.
        longest: tokens of the longest example.
    """

    def __init__(
        self, adapter: Adapter, boundaries: Sequence[Boundary], *, kv_policy: str, prefill_tail: int, longest: int
    ) -> None:
        self._adapter = adapter
        self._boundaries = boundaries
        self._kv_policy = kv_policy
        self._longest = longest
        self._gates = _Gates(boundaries, Scorer(boundaries, adapter.final_norm, adapter.head), prefill_tail)

    def measure(
        self, examples: Sequence[Example], settings: Sequence[ExitSetting], progress: Progress | None = None
    ) -> list[Measured]:
        """Every setting on every example, in one go over the examples: they share full depth and the first stage."""
        variants = [nothing_stops, *(self._gates.stops(setting) for setting in settings)]
        full, *exited = self._replay(MAX_ROWS).run_all(examples, variants, progress)
        is_prompt = np.concatenate([np.arange(len(e.token_ids)) < e.first_judged for e in examples])
        depth = self._adapter.num_layers
        return [
            Measured(
                setting=setting,
                losses=one.disagreements(full),
                exit_share=_mean((one.depths < depth)[one.is_generated]),
                prefill_exit_share=_mean((one.all_depths < depth)[is_prompt]),
                saving=1 - _mean(one.all_depths) / depth,
            )
            for setting, one in zip(settings, exited, strict=True)
        ]

    def noise_floor(self, examples: Sequence[Example]) -> dict[str, float]:
        """Share of tokens where full depth disagrees with itself: ``launches``, in launches of half the rows;
        ``generation``, as it chose them row by row while it generated."""
        full = self._replay(MAX_ROWS).run(examples)
        smaller = self._replay(MAX_ROWS // 2).run(examples)
        chosen = np.concatenate([np.asarray(example.answer_ids) for example in examples])
        return {"launches": 1 - smaller.agreement(full), "generation": _mean(full.choices != chosen)}

    def _replay(self, rows_per_launch: int) -> Replay:
        return Replay(
            self._adapter,
            self._boundaries,
            find_rotary(self._adapter),
            kv_policy=self._kv_policy,
            longest=self._longest,
            rows_per_launch=rows_per_launch,
        )


class _Gates:
    """What the gates say of a launch's rows. Settings that share states are asked one after another, the gates once."""

    def __init__(self, boundaries: Sequence[Boundary], scorer: Scorer, prefill_tail: int) -> None:
        self._boundaries = boundaries
        self._scorer = scorer
        self._tail = max(prefill_tail, 1)
        self._seen: Tensor | None = None
        self._known: dict[str, np.ndarray] = {}

    def stops(self, setting: ExitSetting) -> Stops:
        """Whom the engine would stop under a setting."""

        def stops(boundary: int, states: Tensor, rows: ReplayRows) -> np.ndarray:
            if self._seen is not states:
                self._seen, self._known = states, {}
            stopping: np.ndarray = self._asked("scores", boundary, states, rows) >= setting.thresholds[boundary]
            if setting.prefill_threshold is not None:
                stopping |= self._asked("damages", boundary, states, rows) < setting.prefill_threshold
            return stopping

        return stops

    def _asked(self, what: str, boundary: int, states: Tensor, rows: ReplayRows) -> np.ndarray:
        """Gate scores of generated rows (others -1), or damages of prompt rows that may stop (others infinite)."""
        if what not in self._known:
            is_asked = rows.is_generated if what == "scores" else self._may_stop(rows)
            asked = np.flatnonzero(is_asked)
            values = np.full(len(is_asked), -1.0 if what == "scores" else np.inf)
            if len(asked):
                index = torch.from_numpy(asked).to(states.device)
                values[asked] = (
                    self._scorer.by_gate(boundary, states[index])
                    if what == "scores"
                    else self._damages(boundary, states[index], rows.take(asked))
                ).cpu()
            self._known[what] = values
        return self._known[what]

    def _may_stop(self, rows: ReplayRows) -> np.ndarray:
        may_stop: np.ndarray = (rows.positions > 0) & (rows.positions < rows.first_judged + 1 - self._tail)
        return may_stop

    def _damages(self, boundary: int, states: Tensor, rows: ReplayRows) -> Tensor:
        gate = self._boundaries[boundary].prefill_gate
        assert gate is not None, "prefill exits need a prefill gate"
        at, of = (torch.from_numpy(a).to(states.device) for a in (rows.positions, rows.first_judged + 1))
        return gate.damages(states, at, of)


class AnswerLosses:
    """Loss of a prompt's whole answer, the engine answering by itself.

    Args:
        config: of an engine that runs settings, with its checkpoint.
        provisional: a certificate that lets the engine run a setting.
        task_loss: the loss is by how much it is worse than that of full depth's answer, at least 0; None: 1 where the
            answer is not full depth's, else 0.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        provisional: Callable[[ExitSetting], Certificate],
        *,
        max_tokens: int,
        task_loss: TaskLoss | None = None,
    ) -> None:
        self._model = model
        self._config = config
        self._provisional = provisional
        self._params = SamplingParams(temperature=0, max_tokens=max_tokens)
        self._task_loss = task_loss

    def measure(
        self, examples: Sequence[Example], settings: Sequence[ExitSetting], progress: Progress
    ) -> list[Measured]:
        """Every setting on every example, one engine after another."""
        measured = []
        for number, setting in enumerate(settings):
            measured.append(self._measure(examples, setting))
            progress((number + 1) / len(settings))
        return measured

    def _measure(self, examples: Sequence[Example], setting: ExitSetting) -> Measured:
        assert self._config.exits is not None
        routers = replace(Routers.load(self._config.exits), certificates=[self._provisional(setting)])
        engine = TideEngine(self._model, self._config, routers)
        outputs = engine.generate([example.prompt_ids for example in examples], self._params)
        stats, depth = engine.stats, engine.num_layers
        depths = np.concatenate([output.outputs[0].exit_layers[1:] for output in outputs])
        num_rows = max(stats.rows_through_layer[0], 1)
        engine.runner.pools.release()
        return Measured(
            setting=setting,
            losses=np.array([self._loss(e, o.outputs[0].token_ids) for e, o in zip(examples, outputs, strict=True)]),
            exit_share=_mean(depths < depth),
            prefill_exit_share=stats.num_prefill_exits / max(stats.num_prompt_tokens, 1),
            saving=1 - sum(stats.rows_through_layer) / (depth * num_rows),
        )

    def _loss(self, example: Example, answer_ids: list[int]) -> float:
        if self._task_loss is None:
            return float(answer_ids != example.answer_ids)
        prompt_ids = example.prompt_ids
        return max(0.0, self._task_loss(prompt_ids, answer_ids) - self._task_loss(prompt_ids, example.answer_ids))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
