"""AsyncEngine: sharing, sleeping, cancelling, failing. The engine is scripted; the real one is in tests/ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import aclosing

import pytest

from tide_ray.engine.async_engine import AsyncEngine, EngineDeadError
from tide_ray.types import CompletionOutput, Prompt, RequestOutput, SamplingParams, UserError


class ScriptedEngine:
    """Each step gives every request one token; a request ends after ``max_tokens``. Notes what was asked of it."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.streamed: set[str] = set()
        self.aborted: list[str] = []
        self.threads: set[str] = set()
        self.num_steps = 0
        self.most_at_once = 0
        self.error: Exception | None = None
        self.may_step = threading.Event()
        self.may_step.set()

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams, *, delta_interval_us: int | None = None
    ) -> None:
        assert request_id not in self.left
        self.left[request_id] = params.max_tokens
        if delta_interval_us is not None:
            self.streamed.add(request_id)

    def abort(self, request_id: str) -> None:
        self.left.pop(request_id, None)
        self.aborted.append(request_id)

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[RequestOutput]:
        self.may_step.wait()
        self.threads.add(threading.current_thread().name)
        self.num_steps += 1
        self.most_at_once = max(self.most_at_once, len(self.left))
        if self.error:
            raise self.error
        for request_id in self.left:
            self.left[request_id] -= 1
        done = [request_id for request_id, count in self.left.items() if count == 0]
        for request_id in done:
            del self.left[request_id]
        outputs = [RequestOutput(i, None, [1], [CompletionOutput(0, i, [1], [1], [1], "length")]) for i in done]
        going = [i for i in self.left if i in self.streamed]
        return outputs + [
            RequestOutput(i, None, [1], [CompletionOutput(0, "x", [1], [1], [1])], finished=False) for i in going
        ]


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def shared(engine: ScriptedEngine) -> Iterator[AsyncEngine]:
    made = AsyncEngine(lambda: engine)
    yield made
    engine.may_step.set()
    made.close()


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens)


def test_the_thread_that_steps_the_engine_also_makes_it(engine: ScriptedEngine) -> None:
    """Made elsewhere, its maker's OpenMP pool stayed alive beside the stepping thread's, and both slept at barriers."""
    makers: list[str] = []

    def make() -> ScriptedEngine:
        makers.append(threading.current_thread().name)
        return engine

    shared = AsyncEngine(make)
    assert asyncio.run(shared.generate("x", params(1), "r")).request_id == "r"
    assert shared.engine is engine
    shared.close()
    assert set(makers) == engine.threads == {"tide-engine"}


def test_an_engine_that_cannot_be_made_raises_where_it_was_asked_for() -> None:
    def make() -> ScriptedEngine:
        raise UserError("model: no such folder, got 'x'")

    with pytest.raises(UserError, match="no such folder"):
        AsyncEngine(make)


def test_requests_share_steps_and_each_gets_its_own_answer(engine: ScriptedEngine, shared: AsyncEngine) -> None:
    async def run() -> list[RequestOutput]:
        engine.may_step.clear()
        tasks = [asyncio.create_task(shared.generate("x", params(n), f"r{n}")) for n in (3, 1, 2)]
        await asyncio.sleep(0.05)
        engine.may_step.set()
        return await asyncio.gather(*tasks)

    outputs = asyncio.run(run())
    assert [output.request_id for output in outputs] == ["r3", "r1", "r2"]
    assert engine.most_at_once >= 2
    assert engine.num_steps <= 4
    assert engine.threads == {"tide-engine"}


def test_two_event_loops_share_one_engine(shared: AsyncEngine) -> None:
    results: list[RequestOutput] = []

    def run(name: str) -> None:
        results.append(asyncio.run(shared.generate("x", params(2), name)))

    threads = [threading.Thread(target=run, args=(f"r{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(output.request_id for output in results) == ["r0", "r1", "r2", "r3"]


def test_an_idle_engine_is_not_stepped(engine: ScriptedEngine, shared: AsyncEngine) -> None:
    async def run() -> None:
        await shared.generate("x", params(2))
        await asyncio.sleep(0.1)

    asyncio.run(run())
    assert engine.num_steps == 2


def test_cancelling_a_task_aborts_its_request_only(engine: ScriptedEngine, shared: AsyncEngine) -> None:
    async def run() -> RequestOutput:
        engine.may_step.clear()
        doomed = asyncio.create_task(shared.generate("x", params(100_000_000), "doomed"))
        other = asyncio.create_task(shared.generate("x", params(5), "other"))
        await asyncio.sleep(0.05)
        doomed.cancel()
        engine.may_step.set()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        output = await other
        while not engine.aborted:
            await asyncio.sleep(0.01)
        return output

    assert asyncio.run(run()).request_id == "other"
    assert engine.aborted == ["doomed"]


def test_a_failing_step_reaches_everybody_who_waits_and_kills_the_engine(
    engine: ScriptedEngine, shared: AsyncEngine
) -> None:
    async def run() -> list[RequestOutput | BaseException]:
        engine.error = RuntimeError("out of memory")
        tasks = [asyncio.create_task(shared.generate("x", params(5))) for _ in range(3)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(EngineDeadError, match="out of memory"):
            await shared.generate("x", params(1))
        return results

    results = asyncio.run(run())
    assert [str(result) for result in results if isinstance(result, RuntimeError)] == ["out of memory"] * 3
    assert shared.is_dead


def test_a_stream_gives_every_delta_and_ends_with_the_finished_one(shared: AsyncEngine) -> None:
    async def run() -> tuple[list[bool], RequestOutput]:
        whole = asyncio.create_task(shared.generate("x", params(4)))
        return [output.finished async for output in shared.stream("x", params(4))], await whole

    assert asyncio.run(run())[0] == [False, False, False, True]


def test_leaving_a_stream_aborts_its_request(engine: ScriptedEngine, shared: AsyncEngine) -> None:
    async def run() -> None:
        async with aclosing(shared.stream("x", params(100_000_000), "left")) as stream:
            async for _ in stream:
                break
        while not engine.aborted:
            await asyncio.sleep(0.01)
        assert [output async for output in shared.stream("x", params(1))][-1].finished

    asyncio.run(run())
    assert engine.aborted == ["left"]


def test_a_failing_step_ends_streams(engine: ScriptedEngine, shared: AsyncEngine) -> None:
    async def run() -> None:
        async for _ in shared.stream("x", params(100_000_000)):
            engine.error = RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(run())


def test_an_engine_tells_how_long_it_has_been_in_a_step(engine: ScriptedEngine, shared: AsyncEngine) -> None:
    async def run() -> float:
        engine.may_step.clear()
        task = asyncio.create_task(shared.generate("x", params(1)))
        await asyncio.sleep(0.2)
        stuck = shared.seconds_in_step
        engine.may_step.set()
        await task
        return stuck

    assert asyncio.run(run()) > 0.1
    assert shared.seconds_in_step == 0


def test_closing_ends_requests_that_wait(engine: ScriptedEngine, shared: AsyncEngine) -> None:
    async def run() -> None:
        engine.may_step.clear()
        task = asyncio.create_task(shared.generate("x", params(100_000_000)))
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(asyncio.to_thread(shared.close))
        await asyncio.sleep(0.05)
        engine.may_step.set()
        await closing
        with pytest.raises(EngineDeadError, match="closed"):
            await task
        with pytest.raises(EngineDeadError, match="closed"):
            await shared.generate("x", params(1))

    asyncio.run(run())


def test_a_call_runs_in_the_engines_thread_also_when_nothing_else_is_to_do(
    engine: ScriptedEngine, shared: AsyncEngine
) -> None:
    async def call() -> tuple[str, int]:
        name = await shared.run(lambda _: threading.current_thread().name)
        await shared.generate("p", params(3))
        return name, await shared.run(lambda one: one.num_steps)

    name, num_steps = asyncio.run(call())
    assert {name} == engine.threads
    assert num_steps >= 3


def test_a_call_that_fails_fails_for_its_caller_alone(shared: AsyncEngine) -> None:
    def fail(_engine: ScriptedEngine) -> None:
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        asyncio.run(shared.run(fail))
    assert asyncio.run(shared.generate("p", params(1))).finished
    shared.close()
    with pytest.raises(EngineDeadError):
        asyncio.run(shared.run(fail))
