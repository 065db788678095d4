"""One continuation being generated: its tokens, where its K/V lie and what is known about each token."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from tide_ray.engine.detokenizer import Detokenizer
from tide_ray.engine.prefix_cache import PrefixNode
from tide_ray.types import Logprob, SamplingParams


def now_us() -> int:
    """Monotonic time in microseconds."""
    return time.perf_counter_ns() // 1000


@dataclass(frozen=True, slots=True)
class ExitRules:
    """When the tokens of a request may exit: the score needed at each boundary (infinite: never), and from what.

    ``prompt_exits``: its prompt tokens may stop at a boundary as well.
    """

    thresholds: tuple[float, ...] = ()
    scorer: str = "router"
    prompt_exits: bool = False


NO_EXITS = ExitRules()


@dataclass(frozen=True, slots=True)
class PendingState:
    """A position whose token exited while its deeper K/V are still to be computed, from stage ``stage`` on."""

    stage: int
    position: int
    state: Tensor  # [D]


@dataclass(frozen=True, slots=True)
class Proposal:
    """How a draft was drawn: with which probability, from which exit head's state ``[D]``."""

    probability: float
    state: Tensor


@dataclass(frozen=True, slots=True)
class Draft:
    """A token chosen at a boundary that full depth has not confirmed yet.

    ``score``: of the gate that let it go; ``proposal``: there where it is accepted by ratio (see ``speculation``).
    """

    token_id: int
    score: float
    proposal: Proposal | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one continuation (completion ``index`` of a request).

    ``num_computed`` counts tokens whose K/V are in the pages. All tokens but the newest are computed while decoding;
    fewer while the prompt (or, after a preemption, prompt and answer) is being prefilled. ``drafts`` follow the answer
    until full depth has seen them; each comes from one of the last positions, which are ``pending``. ``num_ahead``
    counts tokens that follow the known ones: launches choose them that have not been read yet. ``prefix`` are its first
    pages as others may share them, full and never written again; ``num_cached_tokens`` counts prompt tokens whose pages
    were there when it was first admitted.
    """

    request_id: str
    index: int
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    max_tokens: int
    arrival_us: int
    output_ids: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    token_times_us: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    detokenizer: Detokenizer | None = None
    gate_scores: list[float] = field(default_factory=list)
    exit_rules: ExitRules = NO_EXITS
    drafts: list[Draft] = field(default_factory=list)
    num_accepted_drafts: int = 0
    num_rejected_drafts: int = 0
    num_computed: int = 0
    num_ahead: int = 0
    slot: int = -1  # its row in the buffers of waiting states while it is resident
    stage: int = 0  # the stage that its newest token is ready for
    waiting_score: float = math.nan  # of the gate it passed last, while it waits for ``stage``
    pending: list[PendingState] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    prefix: list[PrefixNode] = field(default_factory=list)
    num_cached_tokens: int = 0
    admitted_us: int = 0
    last_token_us: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def num_tokens(self) -> int:
        """Of prompt and answer, drafts and those ahead included."""
        return len(self.prompt_ids) + len(self.output_ids) + len(self.drafts) + self.num_ahead

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Only its newest token is still to be run, and that token is its own."""
        return self.num_uncomputed == 1 and bool(self.output_ids or self.num_ahead)

    @property
    def is_ending(self) -> bool:
        """The last token that it may have is ahead."""
        return bool(self.num_ahead) and len(self.output_ids) + self.num_ahead >= self.max_tokens

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def tokens(self, start: int, count: int) -> list[int]:
        """Tokens at positions ``start`` to ``start + count``, over prompt, answer and drafts, as far as known."""
        prompt_length = len(self.prompt_ids)
        answer = self.answer_with_drafts(len(self.drafts)) if self.drafts else self.output_ids
        if start >= prompt_length:
            return answer[start - prompt_length : start - prompt_length + count]
        return (self.prompt_ids[start : start + count] + answer)[:count]

    def answer_with_drafts(self, num_drafts: int) -> list[int]:
        """Its tokens so far, and the first ``num_drafts`` drafts."""
        return self.output_ids + [draft.token_id for draft in self.drafts[:num_drafts]]

    @property
    def kv_tag(self) -> bool:
        """Tells apart K/V of prompts that run every layer and of prompts whose tokens may stop."""
        return self.exit_rules.prompt_exits

    def depths(self, start: int, count: int) -> list[int]:
        """Depths of the computed tokens of the answer at positions ``start`` to ``start + count``.

        A token's own depth is that of the token it chose, the next one.
        """
        first = max(start - len(self.prompt_ids), 0) + 1
        return self.exit_layers[first : max(start + count - len(self.prompt_ids), 0) + 1]

    def forget_computed(self) -> None:
        """Nothing of it is computed any more: its pages were taken away."""
        self.pages = []
        self.prefix = []
        self.num_computed = self.stage = 0
        self.pending.clear()
        self.drafts.clear()  # their states are gone, and with them what would confirm them

    def page_array(self) -> np.ndarray:
        return np.array(self.pages, dtype=np.int32)

    def append(
        self, token_id: int, depth: int, logprobs: dict[int, Logprob] | None, time_us: int, score: float = math.nan
    ) -> None:
        """Note a generated token, the depth it left at, the last gate's score (NaN: none was asked) and when."""
        self.output_ids.append(token_id)
        self.exit_layers.append(depth)
        self.gate_scores.append(score)
        self.token_times_us.append(time_us - (self.last_token_us or self.admitted_us))
        self.last_token_us = time_us
        if logprobs is not None:
            self.logprobs.append(logprobs)
