"""One model behind an engine: admission, encoding, answers. It runs in a replica, or in process for tests.

Whatever goes wrong comes back as a Failure. Nothing here logs a prompt.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from tide_ray.engine.async_engine import AsyncEngine, EngineDeadError
from tide_ray.engine.engine import TideEngine
from tide_ray.exits.certificates import Certificate, pick
from tide_ray.serve.backend import Delta, Limits, ModelFacts
from tide_ray.serve.calls import PARAM_NAMES, Call
from tide_ray.serve.config import LLMConfig
from tide_ray.serve.errors import ENGINE_DEAD, INTERNAL, Failure, from_user_error, invalid
from tide_ray.serve.responses import fingerprint_text
from tide_ray.types import Prompt, RequestOutput, SamplingParams, UserError

logger = logging.getLogger("tide_ray.serve")

LONG_TEXT = 4096
"""Characters from which a prompt is encoded in another thread, so that streams do not wait for it."""


class ModelServer:
    """Answers calls for one model.

    Args:
        config: the model and its limits.
        limits: of the front.

    Raises:
        UserError: the model cannot be loaded or run.
    """

    def __init__(self, config: LLMConfig, limits: Limits | None = None) -> None:
        self._config = config
        self._limits = limits or Limits()
        self._engine = AsyncEngine(partial(_warm_engine, config))
        engine = self._engine.engine
        self._max_in_flight = engine.max_num_seqs + config.max_queued_requests
        self._in_flight = 0
        self._num_streams = 0
        self._seconds_per_completion = 1.0
        self._created = int(time.time())

    @property
    def engine(self) -> AsyncEngine[TideEngine]:
        return self._engine

    @property
    def num_in_flight(self) -> int:
        """Completions that were let in and are not answered."""
        return self._in_flight

    @property
    def is_healthy(self) -> bool:
        """False once the engine has failed, or when it hangs in a step."""
        return not self._engine.is_dead and self._engine.seconds_in_step < self._config.hang_seconds

    async def is_alive(self) -> bool:
        return self.is_healthy

    async def facts(self) -> ModelFacts | Failure:
        engine = self._engine.engine
        certificates = engine.routers.certificates if engine.routers is not None else ()
        return ModelFacts(
            created=self._created,
            fingerprint=fingerprint_text(engine.model.fingerprint),
            max_model_len=engine.max_model_len,
            num_layers=engine.num_layers,
            boundaries=() if engine.routers is None else tuple(engine.routers.depths),
            policy=engine.describe()["policy"],
            epsilons=tuple(c.epsilon for c in certificates if c.loss == engine.config.certified_loss),
        )

    async def generate(self, call: Call) -> list[RequestOutput] | Failure:
        if (refusal := self._refusal(call)) is not None:
            return refusal
        self._in_flight += call.num_completions
        start = time.monotonic()
        try:
            prepared = await self._prepare(call)
            if isinstance(prepared, Failure):
                return prepared
            runs = [self._engine.generate(ids, params) for ids, params in prepared]
            outputs = await _all(runs)
        except Exception as error:
            return self._failure(error)
        finally:
            self._in_flight -= call.num_completions
        self._note(time.monotonic() - start, call.num_completions)
        failures = (from_user_error(o.error, PARAM_NAMES) for o in outputs if o.error)
        return next(failures, None) or outputs

    async def stream(self, call: Call) -> AsyncGenerator[list[Delta] | Failure]:
        if (refusal := self._refusal(call)) is not None:
            yield refusal
            return
        self._in_flight += call.num_completions
        self._num_streams += 1
        start = time.monotonic()
        try:
            prepared = await self._prepare(call)
            if isinstance(prepared, Failure):
                yield prepared
                return
            async with aclosing(self._deltas(call, prepared)) as deltas:
                async for delta in deltas:
                    if error := next((d.output.error for d in delta if d.output.error), None):
                        yield from_user_error(error, PARAM_NAMES)
                        return
                    yield delta
            self._note(time.monotonic() - start, call.num_completions)
        except Exception as error:
            yield self._failure(error)
        finally:
            self._in_flight -= call.num_completions
            self._num_streams -= 1

    def close(self) -> None:
        self._engine.close()

    async def _deltas(
        self, call: Call, prepared: list[tuple[list[int], SamplingParams]]
    ) -> AsyncGenerator[list[Delta]]:
        interval_us = self._interval_us(call)
        streams = [self._engine.stream(ids, params, interval_us=interval_us) for ids, params in prepared]
        if len(streams) == 1:  # as nearly always
            async with aclosing(streams[0]) as stream:
                async for output in stream:
                    yield [Delta(0, output)]
            return
        queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        tasks = [asyncio.create_task(_pump(index, stream, queue)) for index, stream in enumerate(streams)]
        try:
            num_open = len(streams)
            while num_open:
                items = [await queue.get()]
                while not queue.empty():
                    items.append(queue.get_nowait())
                if (failed := next((item for item in items if isinstance(item, Exception)), None)) is not None:
                    raise failed
                found = [item for item in items if isinstance(item, Delta)]
                num_open -= sum(delta.output.finished for delta in found)
                yield found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _interval_us(self, call: Call) -> int:
        if call.stream_interval_ms is not None:
            return int(1000 * call.stream_interval_ms)
        shared = self._config.stream_ms_per_stream * self._num_streams
        return int(1000 * max(self._config.stream_batching_interval_ms, shared))

    def _refusal(self, call: Call) -> Failure | None:
        if not self.is_healthy:
            return ENGINE_DEAD
        if self._in_flight + call.num_completions <= self._max_in_flight:
            return None
        if call.num_completions > self._max_in_flight:
            return invalid(f"the model takes at most {self._max_in_flight} completions at a time", "n")
        waiting = max(1, self._in_flight - self._engine.engine.max_num_seqs)
        return Failure(
            429, "the model has as many requests as it takes; try again later", "server_overloaded",
            retry_after=min(60.0, waiting * self._seconds_per_completion),
        )  # fmt: skip

    def _note(self, seconds: float, num_completions: int) -> None:
        """Follow the time from one completion's end to the next one's, for Retry-After."""
        residents = min(self._engine.engine.max_num_seqs, self._in_flight + num_completions)
        self._seconds_per_completion += 0.1 * (seconds / residents - self._seconds_per_completion)

    async def _prepare(self, call: Call) -> list[tuple[list[int], SamplingParams]] | Failure:
        """Token ids and parameters for each prompt, or what is wrong with the first that cannot be run."""
        prepared = []
        for prompt in call.prompts:
            try:
                ids = await self._encode(prompt)
                prepared.append((ids, self._fitted(call, len(ids))))
            except _TooLongError as error:
                return invalid(str(error), error.param, "context_length_exceeded")
            except UserError as error:
                return from_user_error(error, PARAM_NAMES)
        return prepared

    async def _encode(self, prompt: Prompt) -> list[int]:
        encoder = self._engine.engine.encoder
        size = len(prompt) if isinstance(prompt, str) else sum(len(str(item)) for item in prompt)
        if size < LONG_TEXT:
            return encoder.encode(prompt)[1]
        return (await asyncio.to_thread(encoder.encode, prompt))[1]

    def _fitted(self, call: Call, num_prompt_tokens: int) -> SamplingParams:
        """The call's parameters with a limit of tokens that there is room for."""
        params = call.params
        engine = self._engine.engine
        longest = min(engine.max_model_len, engine.num_kv_pages * engine.config.page_size)
        limit = self._limits.max_prompt_tokens
        if limit is not None and num_prompt_tokens > limit:
            raise _TooLongError(f"this server takes prompts of at most {limit} tokens, got {num_prompt_tokens}")
        room = longest - num_prompt_tokens
        if room < 1:
            raise _TooLongError(
                f"the model's context is {longest} tokens, the prompt has {num_prompt_tokens} and leaves no room"
            )
        cap, asked = self._limits.max_completion_tokens, params.max_tokens
        if not call.has_limit or asked is None:
            certificate = self._certificate(params)
            limits = (room, cap, None if certificate is None else certificate.max_tokens)
            tokens = min(limit for limit in (asked, *limits) if limit is not None)
            return dataclasses.replace(params, max_tokens=tokens)
        if asked > room:
            raise _TooLongError(
                f"the model's context is {longest} tokens, the prompt has {num_prompt_tokens}: "
                f"max_tokens must be at most {room}, got {asked}",
                "max_tokens",
            )
        if cap is not None and asked > cap:
            raise UserError(f"max_tokens must be at most {cap} on this server, got {asked}")
        return params

    def _certificate(self, params: SamplingParams) -> Certificate | None:
        engine = self._engine.engine
        asked = engine.config.max_disagreement if params.max_disagreement is None else params.max_disagreement
        if asked is None or engine.routers is None or params.exit_policy == "full":
            return None
        return pick(engine.routers.certificates, asked, engine.config.certified_loss)

    def _failure(self, error: Exception) -> Failure:
        if isinstance(error, EngineDeadError) or self._engine.is_dead:
            logger.error("the engine failed: %s", type(error.__cause__ or error).__name__)
            return ENGINE_DEAD
        # Its message may hold a piece of the prompt, so the log gets the place only.
        logger.error("request failed: %s at %s", type(error).__name__, _place(error))
        return INTERNAL


class _TooLongError(UserError):
    def __init__(self, message: str, param: str = "prompt") -> None:
        super().__init__(message)
        self.param = param


def _warm_engine(config: LLMConfig) -> TideEngine:
    engine = TideEngine.from_pretrained(config.model_source, config.engine_config)
    engine.warm_up()
    return engine


async def _pump(index: int, stream: AsyncGenerator[RequestOutput], queue: asyncio.Queue[Delta | Exception]) -> None:
    try:
        async with aclosing(stream):
            async for output in stream:
                queue.put_nowait(Delta(index, output))
    except Exception as error:  # of any kind: it is raised where the queue is read
        queue.put_nowait(error)


async def _all(runs: list[Any]) -> list[RequestOutput]:
    """As ``gather``, but when one fails or this is cancelled none goes on."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run) for run in runs]
    return [task.result() for task in tasks]


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "unknown" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
