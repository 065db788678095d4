"""From a request body to a call: prompts and sampling parameters, as the server and the batch job both need them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from tide_ray.serve.errors import Failure, from_user_error, invalid
from tide_ray.serve.protocol import ChatCompletionRequest, CompletionRequest, TideOptions
from tide_ray.types import Prompt, SamplingParams, UserError

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's, for completions; chat answers go on to the end."""

PARAM_NAMES = {
    "exit_threshold": "tide.threshold",
    "exit_policy": "tide.policy",
    "exit_min_depth": "tide.min_depth",
    "max_disagreement": "tide.max_disagreement",
}
"""The API's names of what SamplingParams calls otherwise."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a model is asked for: each prompt is answered ``params.n`` times.

    Without ``has_limit`` the client gave no ``max_tokens``: those of ``params`` are the endpoint's default, and fewer
    will do. ``stream_interval_ms``: least time between two deltas, None for the model's own.
    """

    request_id: str
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    has_limit: bool
    stream_interval_ms: float | None = None

    @property
    def num_completions(self) -> int:
        return len(self.prompts) * self.params.n


def new_request_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def completion_call(body: CompletionRequest) -> Call | Failure:
    """A ``/v1/completions`` body as a call."""
    if body.best_of not in (None, body.n or 1):
        return invalid(f"best_of must equal n, got {body.best_of}", "best_of")
    default = max(DEFAULT_COMPLETION_TOKENS, body.min_tokens or 0)
    return _call("cmpl", body, _prompts(body.prompt), limit=body.max_tokens, default=default, logprobs=body.logprobs)


def chat_call(body: ChatCompletionRequest) -> Call | Failure:
    """A ``/v1/chat/completions`` body as a call."""
    if body.top_logprobs is not None and not body.logprobs:
        return invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    messages = [message.plain() for message in body.messages]
    limit = body.max_completion_tokens or body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _call("chatcmpl", body, (messages,), limit=limit, default=None, logprobs=logprobs)


def _call(
    kind: str,
    body: CompletionRequest | ChatCompletionRequest,
    prompts: tuple[Prompt, ...],
    *,
    limit: int | None,
    default: int | None,
    logprobs: int | None,
) -> Call | Failure:
    if body.stream_options is not None and not body.stream:
        return invalid("stream_options needs stream to be true", "stream_options")
    tide = body.tide or TideOptions()
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    try:
        params = SamplingParams(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            min_p=body.min_p or 0.0,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            max_tokens=limit or default,
            min_tokens=body.min_tokens or 0,
            stop=stop,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            seed=body.seed,
            n=body.n or 1,
            logprobs=logprobs,
            exit_threshold=tide.threshold,
            exit_min_depth=tide.min_depth,
            exit_policy=tide.policy,
            max_disagreement=tide.max_disagreement,
        )
    except UserError as error:
        return from_user_error(error, PARAM_NAMES)
    return Call(new_request_id(kind), prompts, params, limit is not None, tide.stream_interval_ms)


def _prompts(prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]) -> tuple[Prompt, ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt[0], int):
        return (cast(Sequence[int], prompt),)
    return tuple(cast(Sequence[Prompt], prompt))
