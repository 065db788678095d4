"""``await``-able requests over one engine: a thread makes it, steps it while there is work and sleeps otherwise.

Any number of coroutines, in any event loop, share the engine, so a finished row is replaced by whichever is next.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from tide_ray.types import Prompt, RequestOutput, SamplingParams


class SteppedEngine(Protocol):
    """What is used of a TideEngine, all of it from the one thread that also makes it."""

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams, *, delta_interval_us: int | None = None
    ) -> None:
        """Queue a request. Raises UserError if it cannot be answered.

        Args:
            delta_interval_us: least time between its deltas, in microseconds; None: one output, when it is finished.
        """

    def abort(self, request_id: str) -> None:
        """Forget a request; its place is free from the next step on."""

    def has_unfinished_requests(self) -> bool:
        """Whether ``step`` has anything to do."""

    def step(self) -> list[RequestOutput]:
        """Run what is scheduled next. Returns what became finished, and the deltas that are due."""


Engine = TypeVar("Engine", bound=SteppedEngine)
Result = TypeVar("Result")


class EngineDeadError(RuntimeError):
    """The engine failed in an earlier step, or was closed; it takes no more requests."""


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    request_id: str
    prompt: Prompt
    params: SamplingParams
    delta_interval_us: int | None
    loop: asyncio.AbstractEventLoop
    results: asyncio.Queue[RequestOutput | BaseException] = field(default_factory=asyncio.Queue)


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    work: Callable[[Any], Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


class AsyncEngine(Generic[Engine]):
    """Makes an engine in a thread of its own and steps it there.

    One thread does both because OpenMP gives every thread that computes its own pool: once a pool left behind by
    loading weights and the stepping thread's pool are more threads than cores, GNU OpenMP stops spinning at barriers
    and sleeps instead, which cost a quarter of the throughput (276,000 context switches in 25 s on two cores).

    A request that the engine rejects resolves normally, with ``RequestOutput.error`` set. When a step raises, every
    waiting request gets that exception and later ones get EngineDeadError.

    Args:
        make_engine: called once, in the thread. What it raises is raised here.
    """

    def __init__(self, make_engine: Callable[[], Engine]) -> None:
        self._make_engine = make_engine
        self._made = threading.Event()
        self._changed = threading.Condition()
        self._arrived: deque[_Waiter] = deque()
        self._cancelled: deque[str] = deque()
        self._calls: deque[_Call] = deque()
        self._waiting: dict[str, _Waiter] = {}
        self._is_closing = False
        self._failure: BaseException | None = None
        self._step_began: float | None = None
        self._ids = itertools.count()
        self._thread = threading.Thread(target=self._run, name="tide-engine", daemon=True)
        self._thread.start()
        self._made.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    @property
    def engine(self) -> Engine:
        """The engine, for reading facts about it; only its own thread may call what changes it."""
        return self._engine

    @property
    def is_dead(self) -> bool:
        """Whether it takes no more requests: a step failed, or it was closed."""
        return self._failure is not None

    @property
    def seconds_in_step(self) -> float:
        """How long the engine has been in its present step, 0 between steps. It tells an engine that hangs."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    async def generate(self, prompt: Prompt, params: SamplingParams, request_id: str | None = None) -> RequestOutput:
        """Wait for one request. Cancelling the task aborts the request.

        Args:
            request_id: unique among the requests in the engine; made up when None.

        Raises:
            EngineDeadError: the engine failed before, or is closed.
            Exception: whatever the engine's step raised while this request waited.
        """
        waiter = self._enter(prompt, params, request_id, None)
        output = None
        try:
            output = await _next_result(waiter)
            return output
        finally:
            self._leave(waiter, output)

    async def stream(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None = None, *, interval_us: int = 0
    ) -> AsyncGenerator[RequestOutput]:
        """One request as deltas, the last of them ``finished``. Closing the generator aborts the request.

        Args:
            interval_us: least time between two deltas, see ``engine.deltas``.

        Raises: as ``generate``.
        """
        waiter = self._enter(prompt, params, request_id, interval_us)
        output = None
        try:
            while output is None or not output.finished:
                output = await _next_result(waiter)
                yield output
        finally:
            self._leave(waiter, output)

    def _enter(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None, interval_us: int | None
    ) -> _Waiter:
        name = request_id or f"request-{next(self._ids)}"
        waiter = _Waiter(name, prompt, params, interval_us, asyncio.get_running_loop())
        with self._changed:
            self._check_alive()
            self._arrived.append(waiter)
            self._changed.notify()
        return waiter

    def _leave(self, waiter: _Waiter, last: RequestOutput | None) -> None:
        """Abort what is left of a request."""
        if last is None or not last.finished:
            with self._changed:
                self._cancelled.append(waiter.request_id)
                self._changed.notify()

    async def run(self, work: Callable[[Engine], Result]) -> Result:
        """What ``work`` returns, or raises: it is called with the engine, in its thread, between two steps.

        Raises:
            EngineDeadError: the engine failed before, or is closed.
        """
        loop = asyncio.get_running_loop()
        call = _Call(work, loop, loop.create_future())
        with self._changed:
            self._check_alive()
            self._calls.append(call)
            self._changed.notify()
        result: Result = await call.future
        return result

    def close(self) -> None:
        """Stop the thread after its current step; requests still waiting get EngineDeadError. May be called twice."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(f"the engine failed: {self._failure}") from self._failure
        if self._is_closing:
            raise EngineDeadError("the engine is closed")

    def _run(self) -> None:
        # torch keeps its thread count per thread: without this a new thread starts from OMP_NUM_THREADS.
        torch.set_num_threads(torch.get_num_threads())
        try:
            self._engine = self._make_engine()
        except BaseException as error:  # of any kind: it is raised where the engine was asked for
            self._failure = error
            return
        finally:
            self._made.set()
        try:
            while self._take_changes():
                self._step_began = time.monotonic()
                outputs = self._engine.step()
                self._step_began = None
                _resolve([(self._waiter_of(output), output) for output in outputs])
        except Exception as error:  # of any kind: it must reach those who wait, or they wait for ever
            self._fail(error)
        else:
            self._fail(EngineDeadError("the engine is closed"))

    def _waiter_of(self, output: RequestOutput) -> _Waiter | None:
        if output.finished:
            return self._waiting.pop(output.request_id, None)
        return self._waiting.get(output.request_id)

    def _take_changes(self) -> bool:
        """Hand arrivals and cancellations to the engine, sleeping until there is work. False when closing."""
        with self._changed:
            while not (self._arrived or self._cancelled or self._calls or self._is_closing or self._has_requests()):
                self._changed.wait()
            if self._is_closing:
                return False
            arrived, self._arrived = self._arrived, deque()
            cancelled, self._cancelled = self._cancelled, deque()
            calls, self._calls = self._calls, deque()
        for waiter in arrived:
            self._waiting[waiter.request_id] = waiter
            self._engine.add_request(
                waiter.request_id, waiter.prompt, waiter.params, delta_interval_us=waiter.delta_interval_us
            )
        for request_id in cancelled:
            if self._waiting.pop(request_id, None) is not None:
                self._engine.abort(request_id)
        for call in calls:
            _resolve([(call, _outcome(call.work, self._engine))])
        return True

    def _has_requests(self) -> bool:
        return self._engine.has_unfinished_requests()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = error
            self._step_began = None
            left: list[_Waiter | _Call] = [*self._waiting.values(), *self._arrived, *self._calls]
            self._waiting.clear()
            self._arrived.clear()
            self._calls.clear()
        _resolve([(waiter, error) for waiter in left])


async def _next_result(waiter: _Waiter) -> RequestOutput:
    result = await waiter.results.get()
    if isinstance(result, BaseException):
        raise result
    return result


def _outcome(work: Callable[[Any], Any], engine: Any) -> Any:
    """What a call returns or raises: its failure is its caller's, and the engine goes on."""
    try:
        return work(engine)
    except Exception as error:  # of any kind: it is raised where the call was made
        return error


def _resolve(results: Sequence[tuple[_Waiter | _Call | None, Any]]) -> None:
    """Deliver results, with one wake-up per event loop; results that nobody waits for any more are dropped."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Waiter | _Call, Any]]] = defaultdict(list)
    for waiter, result in results:
        if waiter is not None:
            by_loop[waiter.loop].append((waiter, result))
    for loop, pairs in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_set_results, pairs)


def _set_results(pairs: list[tuple[_Waiter | _Call, Any]]) -> None:
    for waiter, result in pairs:
        if isinstance(waiter, _Waiter):
            waiter.results.put_nowait(result)
        elif waiter.future.done():
            continue
        elif isinstance(result, BaseException):
            waiter.future.set_exception(result)
        else:
            waiter.future.set_result(result)
