"""Runs one call and sends its answer, whole or as a stream, unless the client leaves or takes too long first."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from starlette.responses import JSONResponse, Response

from tide_ray.serve.backend import Backend, Delta
from tide_ray.serve.calls import Call
from tide_ray.serve.errors import CANCELLED, INTERNAL, TIMED_OUT, Failure
from tide_ray.serve.guard import Receive, Scope, Send
from tide_ray.serve.metrics import ServerMetrics
from tide_ray.serve.responses import DONE, Answer, event
from tide_ray.types import RequestOutput

logger = logging.getLogger("tide_ray.serve")

Result = TypeVar("Result")
Events = AsyncGenerator[list[Delta] | Failure]


class AsciiJSONResponse(JSONResponse):
    """JSON in ASCII: a lone surrogate, which JSON can spell, has no UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


def failure_response(failure: Failure) -> Response:
    """A failure as a response."""
    return AsciiJSONResponse(failure.body, status_code=failure.status, headers=failure.headers)


@dataclass(slots=True)
class Record:
    """One line of log and the metrics of a request, however it ends."""

    metrics: ServerMetrics
    answer: Answer
    endpoint: str
    model: str
    owner: str
    request_id: str
    start: float
    first_token: float | None = None
    last_token: float | None = None

    def began(self) -> None:
        self.metrics.began(self.model)

    def got_tokens(self) -> None:
        self.last_token = time.monotonic() - self.start
        if self.first_token is None:
            self.first_token = self.last_token

    def ended(self, status: int) -> None:
        seconds, tally = time.monotonic() - self.start, self.answer.tally
        self.metrics.ended(self.model, self.endpoint, status, seconds)
        self.metrics.tokens(self.model, tally.prompt_tokens, tally.depths)
        self.metrics.stream_times(self.model, self.first_token, self.last_token, len(tally.depths))
        logger.info(
            "%s %s key=%s model=%s status=%d prompt_tokens=%d tokens=%d mean_depth=%.2f seconds=%.3f",
            self.request_id, self.endpoint, self.owner, self.model, status, tally.prompt_tokens,
            len(tally.depths), tally.mean_depth, seconds,
        )  # fmt: skip


class WholeAnswer(Response):
    """Waits for all of an answer."""

    def __init__(self, backend: Backend, call: Call, record: Record, timeout_s: float) -> None:
        super().__init__()
        self._backend = backend
        self._call = call
        self._record = record
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record, status = self._record, 499
        record.began()
        try:
            outcome = await _unless_gone(self._outcome(), receive)
            if outcome is None:
                return
            if isinstance(outcome, Failure):
                response = failure_response(outcome)
            else:
                response = AsciiJSONResponse(record.answer.whole(outcome))
            status = response.status_code
            await response(cast(Any, scope), receive, send)
        finally:
            record.ended(status)

    async def _outcome(self) -> Sequence[RequestOutput] | Failure:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._backend.generate(self._call)
        except TimeoutError:
            return TIMED_OUT


class StreamedAnswer(Response):
    """Server-sent events. Nothing is sent before the first tokens, so that a refusal has its own status."""

    def __init__(self, backend: Backend, call: Call, record: Record, timeout_s: float, *, include_usage: bool) -> None:
        super().__init__()
        self._backend = backend
        self._call = call
        self._record = record
        self._timeout_s = timeout_s
        self._include_usage = include_usage
        self._status = CANCELLED.status
        self._has_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._record.began()
        try:
            await _unless_gone(self._send_all(scope, receive, send), receive)
        finally:
            self._record.ended(self._status)

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> bool:
        failure: Failure | None = None
        try:
            stream = cast(Events, self._backend.stream(self._call))
            async with asyncio.timeout(self._timeout_s), aclosing(stream) as items:
                async for item in items:
                    if isinstance(item, Failure):
                        failure = item
                        break
                    self._record.got_tokens()
                    await self._send_event(send, self._record.answer.chunk(item))
        except TimeoutError:
            failure = TIMED_OUT
        if failure is None and not self._has_started:
            failure = INTERNAL
        if failure is not None:
            self._status = failure.status
            if not self._has_started:
                await failure_response(failure)(cast(Any, scope), receive, send)
                return True
            await self._send_event(send, failure.body)
        else:
            self._status = 200
            if self._include_usage:
                await self._send_event(send, self._record.answer.usage_chunk())
        await send({"type": "http.response.body", "body": DONE, "more_body": False})
        return True

    async def _send_event(self, send: Send, data: dict[str, Any]) -> None:
        if not self._has_started:
            self._has_started = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": event(data), "more_body": True})


async def _unless_gone(work: Coroutine[Any, Any, Result], receive: Receive) -> Result | None:
    """The result of ``work``, or None when the client left first, which cancels it."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await cast(Awaitable[Any], receive()))["type"] != "http.disconnect":
        pass
