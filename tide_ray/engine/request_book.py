"""Requests from when they are asked for until their outputs are handed out, each once and to whom it is for."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from tide_ray.engine.admission import RequestMaker
from tide_ray.engine.deltas import Deltas
from tide_ray.engine.requests import PromptEncoder, Request, rejected, to_output
from tide_ray.engine.scheduler import Scheduler
from tide_ray.engine.sequence import Sequence, now_us
from tide_ray.types import EngineStats, Prompt, RequestOutput, SamplingParams, UserError


class RequestBook:
    """An engine's requests. Those that run are known to the scheduler, too.

    Args:
        tokenizer: the model's, None when it has none.
    """

    def __init__(
        self, encoder: PromptEncoder, maker: RequestMaker, scheduler: Scheduler, stats: EngineStats, tokenizer: Any
    ) -> None:
        self._encoder = encoder
        self._maker = maker
        self._scheduler = scheduler
        self._stats = stats
        self._tokenizer = tokenizer
        self._running: dict[str, Request] = {}
        self._deltas: dict[str, Deltas] = {}  # of those that run and are handed out piece by piece
        self._finished: dict[str, RequestOutput] = {}  # not yet handed out
        self._claimed: set[str] = set()  # of a running generate or stream, for which ``take`` leaves them

    @property
    def running(self) -> list[str]:
        """Ids of the requests that run, oldest first."""
        return list(self._running)

    @property
    def has_running(self) -> bool:
        return bool(self._running)

    @property
    def has_unclaimed(self) -> bool:
        """Whether there is a request whose output, or the rest of it, ``take`` will return."""
        return len(self._running) + len(self._finished) > len(self._claimed)

    def get(self, request_id: str) -> Request | None:
        """The request, None when it is unknown or has finished."""
        return self._running.get(request_id)

    def add(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        is_claimed: bool = False,
        streaming: bool = False,
        delta_interval_us: int | None = None,
    ) -> None:
        """Queue a prompt, or note why it is rejected. Raises UserError where ``request_id`` is in use."""
        if request_id in self._running or request_id in self._finished:
            raise UserError(f"request_id must be unique among running requests, got {request_id!r}")
        if is_claimed:
            self._claimed.add(request_id)
        text: str | None = prompt if isinstance(prompt, str) else None
        prompt_ids: list[int] = []
        try:
            text, prompt_ids = self._encoder.encode(prompt)
            streaming = streaming or delta_interval_us is not None
            request = self._maker.make(request_id, text, prompt_ids, params, streaming=streaming)
        except UserError as error:
            self._stats.num_rejected_requests += 1
            self._finished[request_id] = rejected(request_id, text, prompt_ids, str(error))
            return
        self._running[request_id] = request
        if delta_interval_us is not None:
            self._deltas[request_id] = Deltas(request, delta_interval_us)
        for sequence in request.sequences:
            self._scheduler.add(sequence)

    def remove(self, request_id: str) -> None:
        """Forget a request and free what it holds; nothing happens when it is unknown."""
        self._claimed.discard(request_id)
        self._finished.pop(request_id, None)
        self._deltas.pop(request_id, None)
        request = self._running.pop(request_id, None)
        for sequence in request.sequences if request else ():
            if not sequence.is_finished:
                sequence.finish_reason = "abort"
                self._scheduler.remove(sequence)

    def finish(self, sequences: Seq[Sequence]) -> None:
        """Close the requests all of whose sequences are done, these being the last."""
        for sequence in sequences:
            request = self._running.get(sequence.request_id)
            if request is not None and request.is_finished:  # several of its sequences may end in one launch
                deltas = self._deltas.pop(request.request_id, None)
                output = None if deltas is None else deltas.take(self._tokenizer, now_us())
                self._finished[request.request_id] = output or to_output(request, self._tokenizer)
                del self._running[request.request_id]
                self._stats.num_finished_requests += 1

    def pop(self, request_id: str) -> RequestOutput:
        """The output of a request that has finished."""
        return self._finished.pop(request_id)

    def take(self) -> list[RequestOutput]:
        """Outputs that are not claimed, and what is new of those that are handed out piece by piece."""
        outputs = [
            self._finished.pop(request_id) for request_id in list(self._finished) if request_id not in self._claimed
        ]
        if self._deltas:
            time_us = now_us()
            news = (deltas.take(self._tokenizer, time_us) for deltas in self._deltas.values())
            outputs += [output for output in news if output is not None]
        return outputs
