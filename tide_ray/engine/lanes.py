"""Lanes: each carries the rows of one sequence through the stages of a step.

Rows of a decode lane and the last row of an extend lane are asked at each boundary whether they stop. Prompt rows go
through, or stop where prefill exits say so and the request allows it. Rows of an answer that is computed again after a
preemption stop where they stopped the first time, so that the answer does not change.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from tide_ray.engine.rows import RowSpan
from tide_ray.engine.scheduler import ScheduledSpan
from tide_ray.engine.sequence import PendingState, Sequence

ASKED = -1  # the policy decides
PREFILL = -2  # a prompt token: the prefill gate decides
FOLLOWS = -3  # a pending position: it goes as far as its lane's last row


@dataclass(slots=True)
class Lane:
    """Rows of one sequence in one step.

    ``fates``: int32, one for each row: ASKED, PREFILL, FOLLOWS, or the depth at which the row is to leave.
    ``samples``: the last row chooses a token. ``score``: of the last gate asked.
    """

    sequence: Sequence
    span: RowSpan
    fates: np.ndarray
    samples: bool
    score: float = field(default=float("nan"))

    @property
    def num_rows(self) -> int:
        return len(self.span.positions)

    @property
    def may_wait(self) -> bool:
        """Its rows may wait for a deeper stage: its last row is asked and all others follow it."""
        if self.fates[-1] != ASKED:
            return False
        return len(self.fates) == 1 or bool((self.fates[:-1] == FOLLOWS).all())

    @property
    def pending(self) -> list[PendingState]:
        """Pending positions that its rows attend to."""
        return [p for p in self.sequence.pending if p.position < self.span.positions[-1]]

    def select(self, kept: np.ndarray) -> Lane:
        """The lane with the rows for which ``kept`` holds. It chooses no token once its last row has left."""
        if kept.all():
            return self
        samples = self.samples and bool(kept[-1])
        return Lane(self.sequence, self.span.select(kept), self.fates[kept], samples, self.score)


def scheduled_lane(span: ScheduledSpan, num_layers: int, prefill_tail: int) -> Lane:
    """The rows of a scheduled span.

    Prompt tokens run every layer unless the request lets them stop; the first one and the last ``prefill_tail`` do then
    as well.
    """
    sequence, start = span.sequence, span.sequence.num_computed
    known = sequence.tokens(start, span.count)
    tokens = known + [0] * (span.count - len(known))  # the runner knows where the token ahead is
    rows = RowSpan.run(tokens, start, sequence.page_array(), is_decode=span.is_decode)
    if span.is_decode:
        return Lane(sequence, rows, np.array([ASKED], dtype=np.int32), samples=True)
    fates = np.full(span.count, PREFILL if sequence.exit_rules.prompt_exits else num_layers, dtype=np.int32)
    prompt_length = len(sequence.prompt_ids)
    positions = rows.positions
    fates[(positions == 0) | (positions >= prompt_length - max(prefill_tail, 1))] = num_layers
    again = np.flatnonzero(positions >= prompt_length)  # the row at prompt_length + i chose output token i + 1
    for row in again:
        output = int(positions[row]) - prompt_length + 1
        fates[row] = sequence.exit_layers[output] if output < len(sequence.exit_layers) else ASKED
    return Lane(sequence, rows, fates, span.samples)


def waiting_lane(sequence: Sequence) -> Lane:
    """The lane of a sequence whose newest token waits for a deeper stage."""
    start = sequence.num_tokens - 1
    rows = RowSpan.run(sequence.tokens(start, 1), start, sequence.page_array(), is_decode=True)
    return Lane(sequence, rows, np.array([ASKED], dtype=np.int32), samples=True, score=sequence.waiting_score)


def with_pending(lane: Lane, pending: Seq[PendingState]) -> tuple[Lane, np.ndarray]:
    """The lane with ``pending`` positions of its sequence merged in by position.

    Returns the lane and, for each of its rows, where it comes from: the pending ones first, then the lane's own.
    """
    positions = np.concatenate([[p.position for p in pending], lane.span.positions]).astype(np.int64)
    tokens = [lane.sequence.tokens(p.position, 1)[0] for p in pending] + list(lane.span.token_ids)
    fates = np.concatenate([np.full(len(pending), FOLLOWS, dtype=np.int32), lane.fates])
    order = np.argsort(positions, kind="stable")
    span = RowSpan([tokens[i] for i in order], positions[order], lane.span.pages, is_decode=False)
    return Lane(lane.sequence, span, fates[order], lane.samples, lane.score), order


def row_starts(lanes: Seq[Lane]) -> np.ndarray:
    """Row number of each lane's first row, and the total at the end."""
    return np.concatenate([[0], np.cumsum([lane.num_rows for lane in lanes])])
