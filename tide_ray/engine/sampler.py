"""Chooses the next token of every row: greedy, or a draw from the processed distribution, in one vectorised call.

The order is HuggingFace ``generate``'s: repetition penalty, suppression (min_tokens), temperature, top_k, top_p, min_p.
A draw depends on the row alone (see ``draws``), so a request gets the same tokens alone or in any batch. Equally
likely tokens are kept or dropped together by top_k (as in HuggingFace) and by top_p (where HuggingFace keeps an
arbitrary part of them), so that no result hangs on a sort's order of ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from tide_kernels import gpu
from tide_kernels.sample import SamplingRules, sample_tokens
from tide_ray.engine.choice import Choice, SampledTokens
from tide_ray.engine.draws import UINT64_MASK, argmax, draw, uniform
from tide_ray.engine.transfers import upload, upload_one
from tide_ray.types import SamplingParams

FIRST_CANDIDATES = 64
MORE_CANDIDATES = 1024
"""How many of the likeliest tokens top_p looks at first and next, before it sorts the whole vocabulary."""
MIN_TEMPERATURE = 1e-6

Settle: TypeAlias = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass(slots=True)
class SamplingRow:
    """What the sampler has to know about one row of logits.

    Args:
        params: the request's sampling parameters.
        seed: with ``position`` decides the draw; any integer, taken modulo 2**64.
        position: index of the token to choose among this sequence's outputs.
        token_ids: prompt and output so far; read only when there is a repetition penalty.
        suppressed: ids that may not be chosen yet (EOS and stop ids before min_tokens).
    """

    params: SamplingParams
    seed: int
    position: int
    token_ids: Sequence[int]
    suppressed: tuple[int, ...] = ()

    @property
    def has_edited_logits(self) -> bool:
        return self.params.repetition_penalty != 1.0 or bool(self.suppressed)


class Sampler:
    """Stateless: everything a draw depends on is in the row."""

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor, rows: Sequence[SamplingRow], settle: Settle | None = None) -> Choice:
        """Choose one token per row. GPU kernels do so without a word from the host.

        Args:
            logits: [R, V], any float dtype; left unchanged.
            rows: R rows.
            settle: may change the tokens chosen, [R], in place; it gets the logits as well.
        """
        assert logits.shape[:-1] == (len(rows),), f"{tuple(logits.shape) = }, {len(rows) = }"
        chosen = _chosen_in_one_launch(logits, rows) if gpu.run_on(logits) else self._chosen(logits, rows)
        if settle is not None:
            settle(chosen, logits)
        return Choice(chosen, logits, [row.params.logprobs for row in rows])

    def sample(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> SampledTokens:
        """``choose``, and read the choice."""
        return self.choose(logits, rows).read()

    def _chosen(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
        plain = [r for r, row in enumerate(rows) if row.params.is_greedy and not row.has_edited_logits]
        if len(plain) == len(rows):
            return argmax(logits)
        chosen = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        if plain:
            index = torch.tensor(plain, device=logits.device)
            chosen[index] = argmax(logits.index_select(0, index))
        uniforms = upload_one(uniform([row.seed for row in rows], [row.position for row in rows]), logits.device)
        for group in _processed_groups(logits, rows, skip=set(plain)):
            draws = draw(group.weights, uniforms[group.rows])
            chosen[group.rows] = draws if group.ids is None else group.ids.gather(1, draws[:, None])[:, 0]
        return chosen


def _chosen_in_one_launch(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """The same choices by the GPU kernel, but for draws so near to a limit that another rounding decides."""
    if any(row.has_edited_logits for row in rows):
        logits = _edited_scores(logits.to(torch.float32, copy=True), rows)
    heats = [0.0 if row.params.is_greedy else max(row.params.temperature, MIN_TEMPERATURE) for row in rows]
    arrays: list[np.ndarray] = [
        np.array([heats, [row.params.top_p for row in rows], [row.params.min_p for row in rows]], dtype=np.float32),
        np.array([min(max(row.params.top_k, 0), logits.shape[1]) for row in rows], dtype=np.int32),
        np.array([row.seed & UINT64_MASK for row in rows], dtype=np.uint64).view(np.int64),
        np.array([row.position for row in rows], dtype=np.int64),
    ]
    (heats_there, top_ps, min_ps), top_ks, seeds, positions = upload(arrays, logits.device)
    return sample_tokens(logits, SamplingRules(heats_there, top_ks, top_ps, min_ps, seeds, positions))


def processed_probabilities(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """The distribution [R, V] (float64) that ``Sampler.sample`` draws from, row by row; one-hot for a greedy row."""
    probabilities = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    for group in _processed_groups(logits, rows):
        weights = group.weights.double()
        weights /= weights.sum(dim=-1, keepdim=True)
        ids = torch.arange(logits.shape[1], device=logits.device).expand_as(weights) if group.ids is None else group.ids
        probabilities[group.rows] = torch.zeros_like(probabilities[group.rows]).scatter_(1, ids, weights)
    return probabilities


@dataclass(slots=True)
class _Group:
    """Rows with their unnormalised weights over the whole vocabulary (``ids`` is None) or over candidates.

    Column order is ascending token id wherever the weight is not zero.
    """

    rows: torch.Tensor  # [r]
    weights: torch.Tensor  # [r, C]
    ids: torch.Tensor | None  # [r, C]


def _processed_groups(
    logits: torch.Tensor, rows: Sequence[SamplingRow], skip: set[int] | frozenset[int] = frozenset()
) -> Iterator[_Group]:
    """Every row but those of ``skip``, in groups that take the same path through the filters."""
    vocab_size = logits.shape[1]
    kinds: dict[str, list[int]] = {}
    for r, row in enumerate(rows):
        if r not in skip:
            kinds.setdefault(_kind(row.params, vocab_size), []).append(r)
    for kind, members in kinds.items():
        index = torch.tensor(members, device=logits.device)
        is_all = len(members) == len(rows)
        scores = (logits if is_all else logits.index_select(0, index)).to(torch.float32, copy=is_all)
        scores = _edited_scores(scores, [rows[r] for r in members])
        params = [rows[r].params for r in members]
        if kind == "greedy":
            best = argmax(scores)[:, None]
            yield _Group(index, torch.ones_like(best, dtype=torch.float32), best)
            continue
        # Shifted so that the likeliest token has 0: a tiny temperature cannot overflow.
        scores -= scores.amax(dim=-1, keepdim=True)
        scores /= _column([max(p.temperature, MIN_TEMPERATURE) for p in params], scores)
        if kind == "whole":
            weights = scores.exp_()
            if any(p.min_p > 0 for p in params):
                weights.masked_fill_(weights < _column([p.min_p for p in params], weights), 0.0)
            yield _Group(index, weights, None)
        elif kind == "top_k":
            # More than k, because tokens as likely as the last one may follow.
            width = 2 * max(p.top_k for p in params) + FIRST_CANDIDATES
            yield from _cut_groups(index, scores, params, (width, vocab_size))
        else:
            yield from _cut_groups(index, scores, params, (FIRST_CANDIDATES, MORE_CANDIDATES, vocab_size))


def _kind(params: SamplingParams, vocab_size: int) -> str:
    """Which path a row takes. It depends on the row alone, so that its draw does not depend on the batch."""
    if params.is_greedy:
        return "greedy"
    if 0 < params.top_k < vocab_size:
        return "top_k"
    return "top_p" if params.top_p < 1.0 else "whole"


def _edited_scores(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Apply repetition penalties and suppression in place. scores: [r, V], ours to change."""
    vocab_size = scores.shape[1]
    penalised = [(r, row) for r, row in enumerate(rows) if row.params.repetition_penalty != 1.0]
    if penalised:
        lengths = [len(row.token_ids) for _, row in penalised]
        penalties = np.array([row.params.repetition_penalty for _, row in penalised], dtype=np.float32)
        arrays = [
            np.repeat([r for r, _ in penalised], lengths),
            np.concatenate([np.asarray(row.token_ids, dtype=np.int64) for _, row in penalised]),
            np.repeat(penalties, lengths),
        ]
        at_row, at_id, penalty = upload(arrays, scores.device)
        seen = scores[at_row, at_id]
        # An id that occurs twice writes the same value twice.
        scores[at_row, at_id] = torch.where(seen < 0, seen * penalty, seen / penalty)
    banned = [(r, i) for r, row in enumerate(rows) for i in row.suppressed if 0 <= i < vocab_size]
    if banned:
        at = upload_one(np.array(banned), scores.device)
        scores[at[:, 0], at[:, 1]] = -torch.inf
    return scores


def _cut_groups(
    index: torch.Tensor, scores: torch.Tensor, params: Sequence[SamplingParams], widths: Sequence[int]
) -> Iterator[_Group]:
    """Rows with top_k or top_p: look at the ``widths[0]`` likeliest tokens, and at more for the rows that need more."""
    for width in widths:
        weights, ids, is_exact = _cut(scores, params, min(width, scores.shape[1]))
        exact, inexact = is_exact.nonzero()[:, 0], (~is_exact).nonzero()[:, 0]
        if len(exact):
            yield _by_token_id(index[exact], weights[exact], ids[exact])
        if not len(inexact):
            return
        index, scores, params = index[inexact], scores[inexact], [params[r] for r in inexact.tolist()]


def _cut(
    scores: torch.Tensor, params: Sequence[SamplingParams], width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Apply top_k, top_p and min_p to the ``width`` likeliest tokens.

    Returns:
        weights [r, width] (float64, 0 where dropped), ids [r, width], and is_exact [r]: no token outside could be kept.
    """
    vocab_size = scores.shape[1]
    values, ids = scores.topk(width, dim=-1) if width < vocab_size else scores.sort(dim=-1, descending=True)
    weights = values.double().exp()
    top_k = torch.tensor([p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params], device=scores.device)
    is_limited = (top_k < vocab_size)[:, None]
    k_floor = values.gather(1, top_k.clamp_max(width)[:, None] - 1)
    weights.masked_fill_(values < k_floor, 0.0)
    reached = weights.cumsum(dim=-1)
    mass = reached[:, -1:].clone()
    unlimited = (~is_limited[:, 0]).nonzero()[:, 0]
    if len(unlimited):
        # The likeliest token has weight 1 and therefore probability 1 / mass.
        mass[unlimited] = scores[unlimited].softmax(dim=-1).amax(dim=-1, keepdim=True).double().reciprocal()

    top_p = _column([p.top_p for p in params], mass)
    is_needed = (reached - weights < top_p * mass) | (top_p >= 1.0)
    # The last needed value, not the last needed position: equally likely tokens stay together.
    last_needed = is_needed.sum(dim=-1, keepdim=True).clamp_min(1) - 1
    floor = torch.maximum(k_floor, values.gather(1, last_needed))
    weights.masked_fill_(values < floor, 0.0)
    weights.masked_fill_(weights < _column([p.min_p for p in params], weights), 0.0)
    # top_p is a share of the mass that top_k leaves, so all of that has to be among the candidates.
    is_exact = values[:, -1:] < torch.where(is_limited, k_floor, floor)
    return weights, ids, is_exact[:, 0] | (width == vocab_size)


def _by_token_id(rows: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> _Group:
    """Drop the columns that no row kept (weights fall from left to right) and order the rest by token id."""
    width = max(1, int((weights > 0).sum(dim=-1).max()))
    ids, order = ids[:, :width].sort(dim=-1)
    return _Group(rows, weights[:, :width].gather(1, order), ids)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
