"""What exits would do on held-out sequences: which choices are right at each depth, and how far fitted K/V are off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tide_ray.calibrate.corpus import Example
from tide_ray.calibrate.reservoir import Reservoir
from tide_ray.calibrate.trace import Tracer, TraceRows
from tide_ray.engine.draws import argmax
from tide_ray.exits.readouts import ExitHead, KVHead, kv_width
from tide_ray.models.adapter import Adapter, KVShape

CHUNK = 512
MAX_LENS_ROWS = 2048
"""Rows read without an exit head, for comparison only."""


@dataclass(slots=True)
class Judged:
    """Rows of one split.

    ``rows``, the judged ones, have for every depth D ``state_D`` (unit rms), ``right_D`` (the head's choice is full
    depth's), ``probability_D`` (of the head's choice) and ``cosine_D``; and ``sequence``. ``prompt_rows`` have
    ``state_D``, ``damage_D`` (see ``kv_damages``), ``position``, ``length`` (of the prompt) and ``sequence``.
    ``lens_right``: share of right choices without an exit head.
    """

    rows: Reservoir
    prompt_rows: Reservoir
    lens_right: dict[int, float] = field(default_factory=dict)

    def right(self, depth: int) -> np.ndarray:
        return self.rows.take(f"right_{depth}").numpy()

    def lasting(self, depth: int, depths: Sequence[int]) -> np.ndarray:
        """Right at this depth and at every later one of ``depths``: the gates' label."""
        return np.logical_and.reduce([self.right(later) for later in depths if later >= depth])


class Judge:
    """Compares exit heads and KV heads with full depth.

    Args:
        heads: exit heads as the engine runs them, by depth.
        kv_heads: KV heads by depth, likewise; empty when K/V cannot be fitted.
        kv_scales: by depth, for every column of the KV head the mean square of its layer's K or V.
    """

    def __init__(
        self,
        adapter: Adapter,
        tracer: Tracer,
        heads: Mapping[int, ExitHead],
        kv_heads: Mapping[int, KVHead],
        kv_scales: Mapping[int, Tensor],
    ) -> None:
        self._adapter = adapter
        self._tracer = tracer
        self._heads = heads
        self._kv_heads = kv_heads
        self._kv_scales = kv_scales

    @torch.inference_mode()
    def judge(
        self,
        examples: Sequence[Example],
        *,
        max_rows: int,
        max_prompt_rows: int,
        seed: int,
        for_report: bool = False,
    ) -> Judged:
        """Run a split, keeping at most so many rows of either kind. ``for_report``: with what is only reported,
        ``probability_D`` and ``lens_right``."""
        judged = Judged(Reservoir(max_rows, seed), Reservoir(max_prompt_rows, seed + 1))
        draw = np.random.default_rng(seed)
        # Reading a row through every head costs more than computing it, so no more are read than are kept.
        share = max_rows / max(1, sum(len(example.token_ids) - example.first_judged for example in examples))
        lens: dict[int, list[int]] | None = {depth: [0, 0] for depth in self._heads} if for_report else None
        with_prompts = bool(self._kv_heads) and max_prompt_rows > 0
        prompt_share = max_prompt_rows / max(1, sum(_num_prompt_rows(example) for example in examples))
        for rows in self._tracer.trace(examples, with_keys_values=with_prompts, with_attention=with_prompts):
            chosen = np.flatnonzero(rows.is_judged & (draw.random(len(rows.is_judged)) < share))
            for index in torch.from_numpy(chosen).split(CHUNK):
                self._judge_rows(rows, index, judged, lens)
            if with_prompts:
                self._judge_prompt(rows, draw.random(len(rows.positions)) < prompt_share, judged)
        judged.lens_right = {depth: right / num for depth, (right, num) in (lens or {}).items() if num}
        return judged

    def _judge_rows(self, rows: TraceRows, index: Tensor, judged: Judged, lens: dict[int, list[int]] | None) -> None:
        """Few rows at a time: their logits over the whole vocabulary are what takes memory. ``lens``: right choices and
        choices by depth, counted on; None: not for the report."""
        expected = argmax(self._logits(rows.final[index]))
        entry: dict[str, Tensor] = {"sequence": torch.from_numpy(rows.sequences)[index]}
        for depth, head in self._heads.items():
            states = rows.states[depth][index]
            logits = self._logits(head(states))
            entry[f"state_{depth}"] = states.cpu()
            entry[f"right_{depth}"] = (argmax(logits) == expected).cpu()
            entry[f"cosine_{depth}"] = rows.cosines[depth][index].cpu()
            if lens is not None:
                wide = logits.float()
                entry[f"probability_{depth}"] = (wide.amax(-1) - wide.logsumexp(-1)).exp().cpu()
                if lens[depth][1] < MAX_LENS_ROWS:
                    lens[depth][0] += int((argmax(self._logits(states)) == expected).sum())
                    lens[depth][1] += len(index)
        judged.rows.add(rows.keys[index.numpy()], **entry)

    def _judge_prompt(self, rows: TraceRows, is_drawn: np.ndarray, judged: Judged) -> None:
        """Damages of the drawn prompt rows but the first; of texts, which have no prompt, of all rows but the first."""
        is_text = rows.first_judged == 0
        chosen = np.flatnonzero(is_drawn & (rows.positions > 0) & (~rows.is_judged | is_text))
        for index in torch.from_numpy(chosen).split(CHUNK):
            self._judge_prompt_rows(rows, index, judged)

    def _judge_prompt_rows(self, rows: TraceRows, index: Tensor, judged: Judged) -> None:
        assert rows.keys_values is not None
        assert rows.attention is not None
        lengths = np.where(rows.first_judged == 0, rows.lengths, rows.first_judged + 1)
        entry: dict[str, Tensor] = {
            "sequence": torch.from_numpy(rows.sequences)[index],
            "position": torch.from_numpy(rows.positions)[index],
            "length": torch.from_numpy(lengths)[index],
        }
        for depth, head in self._kv_heads.items():
            states = rows.states[depth][index]
            actual = rows.keys_values[index][:, -len(self._kv_scales[depth]) :]
            entry[f"state_{depth}"] = states.cpu()
            shapes = self._adapter.kv_shapes[depth:]
            errors = kv_errors(head, states, actual, self._kv_scales[depth], shapes)
            entry[f"damage_{depth}"] = kv_damages(errors, rows.attention[index]).cpu()
        judged.prompt_rows.add(rows.keys[index.numpy()], **entry)

    def _logits(self, states: Tensor) -> Tensor:
        return self._adapter.head(self._adapter.final_norm(states[None]))


def _num_prompt_rows(example: Example) -> int:
    return (example.first_judged or len(example.token_ids)) - 1


def kv_errors(head: KVHead, states: Tensor, actual: Tensor, scales: Tensor, shapes: Sequence[KVShape]) -> Tensor:
    """Mean squared error of fitted K/V by layer, in units of ``scales`` (see Judge): ``[N, layers]``."""
    squares = (head(states).float() - actual).square() / scales
    widths = [kv_width([shape]) for shape in shapes]
    return torch.stack([block.mean(-1) for block in squares.split(widths, dim=1)], dim=1)


def kv_damages(errors: Tensor, attention: Tensor) -> Tensor:
    """What K/V errors ``[N, layers]`` cost the answer, ``[N]``: weighted by the attention that it pays to each row.

    ``attention``: as in TraceRows; its last columns are the layers of ``errors``.
    """
    return (errors * attention[:, -errors.shape[1] :]).mean(-1)
