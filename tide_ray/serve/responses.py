"""From outputs to response bodies and to the chunks of a stream, for completions and for chat.

Both are made as plain mappings: a stream has one for every few tokens. Their shapes are in ``protocol``, and a test
holds them against it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tide_ray.serve.backend import Delta
from tide_ray.types import CompletionOutput, Logprob, RequestOutput

REPLACEMENT = "\ufffd"


@dataclass(slots=True)
class Tally:
    """What a request used, for usage, metrics and the log."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    depths: list[int] = field(default_factory=list)
    finished: int = 0

    def add(self, output: RequestOutput, *, is_first: bool) -> None:
        """Take in an output or a delta; ``is_first``: of its prompt."""
        if is_first:
            self.prompt_tokens += len(output.prompt_token_ids)
            self.cached_tokens += output.num_cached_tokens
        for completion in output.outputs:
            self.depths += completion.exit_layers
            self.finished += completion.finish_reason is not None

    @property
    def mean_depth(self) -> float:
        return mean(self.depths)

    @property
    def usage(self) -> dict[str, Any]:
        count = len(self.depths)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": count,
            "total_tokens": self.prompt_tokens + count,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def fingerprint_text(model_fingerprint: str) -> str:
    """A model's fingerprint as bodies tell it."""
    return f"fp_{model_fingerprint[:16]}"


class Writer(Protocol):
    """One endpoint's shapes."""

    object: str
    chunk_object: str

    def choice(self, index: int, output: CompletionOutput) -> dict[str, Any]:
        """A whole choice."""

    def chunk_choice(self, index: int, output: CompletionOutput, *, is_first: bool, offset: int) -> dict[str, Any]:
        """What is new of a choice; ``offset``: characters of it that were sent before."""


class CompletionWriter:
    object = "text_completion"
    chunk_object = "text_completion"

    def choice(self, index: int, output: CompletionOutput) -> dict[str, Any]:
        return {
            "index": index,
            "text": output.text,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            "logprobs": self._logprobs(output, 0),
        }

    def chunk_choice(self, index: int, output: CompletionOutput, *, is_first: bool, offset: int) -> dict[str, Any]:
        return {
            "index": index,
            "text": output.text,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            "logprobs": self._logprobs(output, offset),
        }

    def _logprobs(self, output: CompletionOutput, offset: int) -> dict[str, Any] | None:
        if output.logprobs is None:
            return None
        entries = [
            (_token_text(token, found), found) for token, found in zip(output.token_ids, output.logprobs, strict=True)
        ]
        offsets = []
        for token, (text, _) in zip(output.token_ids, entries, strict=True):
            offsets.append(offset)
            offset += 0 if text == _numbered(token) else len(text)
        has_top = any(len(found) > 1 for _, found in entries)
        top = [{_token_text(token, found): _finite(entry) for token, entry in found.items()} for _, found in entries]
        return {
            "tokens": [text for text, _ in entries],
            "token_logprobs": [
                _finite(found[token]) for token, (_, found) in zip(output.token_ids, entries, strict=True)
            ],
            "top_logprobs": top if has_top else None,
            "text_offset": offsets,
        }


class ChatWriter:
    """Args: num_top: alternatives to list for each token."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top

    def choice(self, index: int, output: CompletionOutput) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            "logprobs": self._logprobs(output),
        }

    def chunk_choice(self, index: int, output: CompletionOutput, *, is_first: bool, offset: int) -> dict[str, Any]:
        delta = {"content": output.text}
        return {
            "index": index,
            "delta": {"role": "assistant", **delta} if is_first else delta,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            "logprobs": self._logprobs(output),
        }

    def _logprobs(self, output: CompletionOutput) -> dict[str, Any] | None:
        if output.logprobs is None:
            return None
        content = []
        for token, found in zip(output.token_ids, output.logprobs, strict=True):
            ranked = sorted(found.items(), key=lambda item: item[1].rank)[: self._num_top]
            top = [_token_logprob(i, found) for i, _ in ranked]
            content.append({**_token_logprob(token, found), "top_logprobs": top})
        return {"content": content, "refusal": None}


def _token_text(token_id: int, found: dict[int, Logprob]) -> str:
    """A token's text, or for a part of a character, which has none, its number: several such would look alike."""
    text = found[token_id].decoded_token
    return _numbered(token_id) if text is None or REPLACEMENT in text else text


def _numbered(token_id: int) -> str:
    return f"token_id:{token_id}"


def _finite(entry: Logprob) -> float:
    """JSON has no infinity; OpenAI writes this for it."""
    return max(entry.logprob, -9999.0)


def _token_logprob(token_id: int, found: dict[int, Logprob]) -> dict[str, Any]:
    text = _token_text(token_id, found)
    return {
        "token": text,
        "logprob": _finite(found[token_id]),
        "bytes": None if text == _numbered(token_id) else list(text.encode("utf-8", "replace")),
    }


def mean(depths: Sequence[int]) -> float:
    return sum(depths) / len(depths) if depths else 0.0


class Answer:
    """The bodies of one request's answer.

    Args:
        request_id: as the bodies tell it.
        n: completions of each prompt.
        model: the name that was asked for.
        fingerprint: the model's, see ``fingerprint_text``.
        writer: the endpoint's shapes.
    """

    def __init__(self, request_id: str, n: int, model: str, fingerprint: str, writer: Writer) -> None:
        self.tally = Tally()
        self._n = n
        self._writer = writer
        self._head = {"id": request_id, "created": int(time.time()), "model": model}
        self._fingerprint = {"system_fingerprint": fingerprint}
        self._sent: dict[int, int] = {}  # characters of each choice that has begun
        self._seen: set[int] = set()

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = []
        for prompt_index, output in enumerate(outputs):
            self.tally.add(output, is_first=True)
            for completion in output.outputs:
                index = prompt_index * self._n + completion.index
                choices.append(
                    self._writer.choice(index, completion)
                    | {"tide": {"exit_layers": completion.exit_layers, "mean_exit_layer": completion.mean_exit_layer}}
                )
        return {
            **self._head,
            "object": self._writer.object,
            **self._fingerprint,
            "choices": choices,
            "usage": self.tally.usage,
        }

    def chunk(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        """The next chunk of a stream."""
        choices = []
        for delta in deltas:
            self.tally.add(delta.output, is_first=delta.prompt_index not in self._seen)
            self._seen.add(delta.prompt_index)
            for completion in delta.output.outputs:
                index = delta.prompt_index * self._n + completion.index
                is_first = index not in self._sent
                offset = self._sent.get(index, 0)
                self._sent[index] = offset + len(completion.text)
                tide = {
                    "exit_layers": completion.exit_layers,
                    "mean_exit_layer": completion.mean_exit_layer,
                    "tokens": completion.token_texts,
                }
                choice = self._writer.chunk_choice(index, completion, is_first=is_first, offset=offset)
                choices.append(choice | {"tide": tide})
        return {**self._head, "object": self._writer.chunk_object, **self._fingerprint, "choices": choices}

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream whose client asked for usage."""
        head = {**self._head, "object": self._writer.chunk_object, **self._fingerprint}
        tide = {"mean_exit_layer": self.tally.mean_depth}
        return {**head, "choices": [], "usage": self.tally.usage, "tide": tide}


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event. ASCII only: a lone surrogate that a client sent could not be encoded otherwise."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
