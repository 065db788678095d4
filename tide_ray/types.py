"""Shared nouns: what a request is, what comes back, and the one error a user can cause.

Names and meanings follow vLLM's ``SamplingParams`` / ``RequestOutput`` so that code written for it reads the same
here; ``exit_layers`` and ``token_times_us`` are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, TypeAlias, TypeGuard

ChatMessage: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[int] | Sequence[ChatMessage]
"""A string (used as it is), token ids, or chat messages (rendered with the tokenizer's template)."""

MAX_LOGPROBS = 100
MAX_COMPLETIONS = 64
REQUEST_POLICIES = ("full", "router", "confidence")
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "detokenize": (True, False, None),
    "prompt_logprobs": (None,),
    "logit_bias": (None, {}),
    "bad_words": (None, []),
}
"""vLLM's sampling parameters that are not known here, with the values that ask for what is done anyway; ``detokenize``
false spares vLLM the text, which is made here always."""


class UserError(ValueError):
    """Bad input from the user. The message is one line that names the field and the value; the CLI exits with 2."""


class JobError(RuntimeError):
    """The job failed for a reason that is not the user's; the message is one line, the CLI exits with 1."""


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a setting's value is one; true and false, which Python takes for 1 and 0, are none."""
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop, with vLLM's names, meanings and defaults.

    Args:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probability reaches it, in (0, 1].
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        min_p: drop tokens less likely than ``min_p`` times the likeliest, in [0, 1].
        repetition_penalty: > 1 discourages tokens seen in the prompt or the output (arXiv 1909.05858).
        max_tokens: most tokens to generate; None: as many as the engine's ``max_model_len`` leaves room for (in rows of
            data sets, where Arrow adds nulls of its own, a null is the default).
        min_tokens: EOS, stop ids and stop strings are ignored before this many tokens.
        stop: strings that end the text; the match and what follows are cut from it.
        stop_token_ids: further ids that end generation, beside the model's EOS ids.
        ignore_eos: generate past EOS.
        seed: makes a sampled request reproducible, alone or in any batch.
        n: completions per prompt.
        logprobs: return this many top log probabilities per token (of the unprocessed logits) and the sampled one's.
        exit_threshold, exit_min_depth, exit_policy: override the engine's settings for this request; ``exit_policy`` is
            ``full`` (no early exit, of the prompt's tokens neither), ``router`` or ``confidence``. Ours, not vLLM's.
        max_disagreement: take the exits that the checkpoint has a certificate for, as the engine's setting of this name
            does, for this request alone. Its prompt runs every layer unless the engine itself runs that certificate.

    Raises:
        UserError: a value is outside its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    exit_threshold: float | None = None
    exit_min_depth: int | None = None
    exit_policy: str | None = None
    max_disagreement: float | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        stop = self.stop
        if stop is None:
            set_field(self, "stop", ())
        elif isinstance(stop, str):
            set_field(self, "stop", (stop,))
        elif isinstance(stop, Sequence):
            set_field(self, "stop", tuple(stop))
        else:
            raise UserError(f"stop must be a string or a list of strings, got {stop!r}")
        ids = self.stop_token_ids
        if ids is not None and (isinstance(ids, str) or not isinstance(ids, Sequence)):
            raise UserError(f"stop_token_ids must be a list of token ids, got {ids!r}")
        set_field(self, "stop_token_ids", tuple(ids or ()))
        self._check_types()
        self._check_ranges()

    def _check_types(self) -> None:
        integers = ("top_k", "min_tokens", "n")
        optional = ("exit_threshold", "max_disagreement")
        for name in (*integers, "max_tokens", "seed", "logprobs", "exit_min_depth"):
            value = getattr(self, name)
            if value is None and name not in integers:
                continue
            if not is_integer(value):
                raise UserError(f"{name} must be an integer, got {value!r}")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", *optional):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise UserError(f"{name} must be a number, got {value!r}")
        if not isinstance(self.ignore_eos, bool):
            raise UserError(f"ignore_eos must be true or false, got {self.ignore_eos!r}")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise UserError(f"stop must hold non-empty strings, got {text!r}")
        for token_id in self.stop_token_ids:
            if not is_integer(token_id):
                raise UserError(f"stop_token_ids must hold integers, got {token_id!r}")

    def _check_ranges(self) -> None:
        checks = (
            ("temperature", 0 <= self.temperature <= 100, "a number from 0 to 100"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= -1, "-1, 0 or positive"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "in (0, 100]"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("min_tokens", 0 <= self.min_tokens <= (self.max_tokens or math.inf), "from 0 to max_tokens"),
            ("n", 1 <= self.n <= MAX_COMPLETIONS, f"from 1 to {MAX_COMPLETIONS}"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
            ("exit_threshold", self.exit_threshold is None or 0 <= self.exit_threshold <= 1, "in [0, 1]"),
            ("exit_min_depth", self.exit_min_depth is None or self.exit_min_depth >= 0, "at least 0"),
            ("exit_policy", self.exit_policy in (None, *REQUEST_POLICIES), f"one of {', '.join(REQUEST_POLICIES)}"),
            ("max_disagreement", self.max_disagreement is None or 0 < self.max_disagreement <= 1, "in (0, 1]"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer"),
        )
        for name, is_valid, expected in checks:
            if not is_valid:
                raise UserError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from a mapping, refusing unknown names (a misspelt parameter must not be silently ignored).

        Names of vLLM's that are not known here may have the values that change nothing.
        """
        known = {f.name for f in fields(cls)}
        values = {name: value for name, value in values.items() if value not in NEUTRAL_VALUES.get(name, ())}
        for name in values:
            if name not in known:
                raise UserError(f"sampling_params: unknown parameter {name!r}; known: {', '.join(sorted(known))}")
        return cls(**values)

    def most_tokens(self, room: int) -> int:
        """``max_tokens``, or ``room`` where that is less."""
        return room if self.max_tokens is None else min(self.max_tokens, room)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log probability of one token under the model's unprocessed logits, and its rank there (1 = likeliest)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One generated continuation. ``token_ids``, ``exit_layers`` and ``token_times_us`` have equal length.

    ``exit_layers`` holds depths: the number of layers run for each token, so the model's layer count means "no early
    exit". ``token_times_us[0]`` is the time to first token since admission, then each token's time since the one
    before, in microseconds. ``finish_reason`` is ``stop``, ``length``, ``abort`` or ``error``; ``stop_reason`` is the
    stop string or stop token id that ended it (None for EOS). ``gate_scores`` holds each token's score at the last
    boundary that was asked, NaN where none was. In mode ``verified``, ``num_accepted_drafts`` tokens were chosen at a
    boundary and confirmed by full depth, and ``num_rejected_drafts`` others were not. In a delta all lists and ``text``
    hold only what is new, and ``token_texts`` the part of ``text`` that came with each token (none for a token whose
    text is held back).
    """

    index: int
    text: str
    token_ids: list[int]
    exit_layers: list[int]
    token_times_us: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    gate_scores: list[float] = field(default_factory=list)
    num_accepted_drafts: int = 0
    num_rejected_drafts: int = 0
    token_texts: list[str] = field(default_factory=list)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """Pickling as dataclasses do it takes several times as long, and streams do it for every few tokens."""
        return CompletionOutput, _completion_values(self)

    @property
    def mean_exit_layer(self) -> float:
        """Mean depth over the generated tokens, 0.0 when there are none."""
        return sum(self.exit_layers) / len(self.exit_layers) if self.exit_layers else 0.0


@dataclass(slots=True)
class RequestOutput:
    """What became of one request, whole or a delta of it. ``error`` is empty unless the request was rejected.

    ``num_cached_tokens``: prompt tokens of the first completion whose K/V came from the prefix cache.
    ``unix_time_us``: when this was.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    error: str = ""
    queue_time_us: int = 0
    total_time_us: int = 0
    num_cached_tokens: int = 0
    unix_time_us: int = 0

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return RequestOutput, _request_values(self)


_completion_values = attrgetter(*(f.name for f in fields(CompletionOutput)))
_request_values = attrgetter(*(f.name for f in fields(RequestOutput)))


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine started.

    ``rows_through_layer[l]`` counts token rows that layer ``l`` really ran, ``num_cached_tokens`` prompt tokens that no
    layer ran for because their K/V came from the prefix cache, ``launches`` the launches of each stage,
    ``num_filled_rows`` rows whose K/V in skipped layers were filled, ``deferred_rows`` rows that a stage ran later for
    their K/V alone, ``num_prefill_exits`` prompt rows that stopped at a boundary, ``num_dropped_tokens`` tokens chosen
    for sequences that had ended: steps may be queued before the tokens of the last one are read,
    ``num_accepted_drafts`` and ``num_rejected_drafts`` tokens chosen at a boundary that full depth confirmed or not,
    ``tokens_at_depth`` generated tokens by the depth that they left at.
    """

    rows_through_layer: list[int]
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    tokens_at_depth: dict[int, int] = field(default_factory=dict)
    num_finished_requests: int = 0
    num_rejected_requests: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    launches: dict[str, int] = field(default_factory=dict)
    num_filled_rows: int = 0
    num_prefill_exits: int = 0
    num_dropped_tokens: int = 0
    num_accepted_drafts: int = 0
    num_rejected_drafts: int = 0
    deferred_rows: dict[str, int] = field(default_factory=dict)

    @property
    def sum_exit_layers(self) -> int:
        """Depths of all generated tokens, summed."""
        return sum(depth * count for depth, count in self.tokens_at_depth.items())

    def reset(self) -> None:
        """Count from zero again, in place: the parts of the engine share this object."""
        fresh = EngineStats(rows_through_layer=[0] * len(self.rows_through_layer))
        for counter in fields(self):
            setattr(self, counter.name, getattr(fresh, counter.name))
