"""Deltas: what is new of a request since it was last handed out, no more often than its caller wants to hear of it."""

from __future__ import annotations

from typing import Any

from tide_ray.engine.requests import Request, request_output, with_text
from tide_ray.engine.sequence import Sequence
from tide_ray.types import CompletionOutput, RequestOutput


class Deltas:
    """Hands out one request piece by piece; the pieces together are its whole output.

    Args:
        request: made for streaming, so that its text is known as it grows.
        interval_us: least time between two deltas; tokens that come meanwhile are gathered. The first token and the
            end are never held back.
    """

    def __init__(self, request: Request, interval_us: int) -> None:
        self.request = request
        self._interval_us = interval_us
        self._next_us = 0
        self._num_tokens = [0] * len(request.sequences)
        self._num_characters = [0] * len(request.sequences)

    def take(self, tokenizer: Any, time_us: int) -> RequestOutput | None:
        """What is new, None when it is nothing or not yet time."""
        is_finished = self.request.is_finished
        if not is_finished and time_us < self._next_us:
            return None
        outputs = [
            self._new_of(sequence, tokenizer)
            for sequence, num_told in zip(self.request.sequences, self._num_tokens, strict=True)
            if len(sequence.output_ids) > num_told  # an end comes with a token, so none is told twice
        ]
        if not outputs:
            return None
        self._next_us = time_us + self._interval_us
        return request_output(self.request, outputs, finished=is_finished)

    def _new_of(self, sequence: Sequence, tokenizer: Any) -> CompletionOutput:
        start, self._num_tokens[sequence.index] = self._num_tokens[sequence.index], len(sequence.output_ids)
        text, pieces = self._new_text(sequence, start)
        wants_logprobs = self.request.params.logprobs is not None
        return CompletionOutput(
            index=sequence.index,
            text=text,
            token_ids=sequence.output_ids[start:],
            exit_layers=sequence.exit_layers[start:],
            token_times_us=sequence.token_times_us[start:],
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            logprobs=with_text(sequence.logprobs[start:], tokenizer) if wants_logprobs else None,
            gate_scores=sequence.gate_scores[start:],
            token_texts=pieces,
        )

    def _new_text(self, sequence: Sequence, start: int) -> tuple[str, list[str]]:
        """The text that can be shown now and was not, and the part of it that came with each token from ``start``."""
        detokenizer = sequence.detokenizer
        count = len(sequence.output_ids) - start
        if detokenizer is None:
            return "", [""] * count
        text = detokenizer.text if sequence.is_finished else detokenizer.stable_text
        sent = self._num_characters[sequence.index]
        self._num_characters[sequence.index] = max(sent, len(text))
        pieces = []
        at = sent
        for end in detokenizer.token_ends[start : start + count]:
            end = max(at, min(end, len(text)))
            pieces.append(text[at:end])
            at = end
        pieces += [""] * (count - len(pieces))  # the stop token has no text
        if pieces and at < len(text):
            pieces[-1] += text[at:]
        return text[sent:], pieces
