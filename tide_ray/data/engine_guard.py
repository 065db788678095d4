"""An engine in an actor, with what can be done when it fails: make it smaller, or end the process.

- Out of memory: the engine is made again for half the residents and half the rows of a step, and its requests run
  again, until one resident is still too many.
- A device error that sticks (a CUDA context is gone for good after most): the process ends. Raising would send the
  retry to this same broken process; only a process that dies is replaced, and its batch run again elsewhere.
- A step that does not end: the process ends, too, since nothing can interrupt it from within.

What ends the process is bounded by the ledger (see ``ledger``): a row that does it again and again is given up.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import inspect
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NoReturn, TypeVar

import torch

from tide_ray.config import EngineConfig
from tide_ray.engine.async_engine import AsyncEngine, EngineDeadError
from tide_ray.engine.engine import TideEngine
from tide_ray.types import Prompt, RequestOutput, SamplingParams

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

DEVICE_ERRORS = ("AcceleratorError", "CudaAPIError")
DEVICE_ERROR_TEXTS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error")
MEMORY_TEXTS = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED", "OUT_OF_MEMORY")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work at a time may help: an allocation failed, on whichever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_TEXTS)


def is_sticky(error: BaseException) -> bool:
    """Whether the device is lost to this process: an error of CUDA's that is not about memory."""
    if is_out_of_memory(error):
        return False
    # Numba's class can only be imported where its driver can be loaded.
    if any(kind.__name__ in DEVICE_ERRORS for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in DEVICE_ERROR_TEXTS)


class GuardedEngine:
    """Answers requests with an engine that is replaced when it runs out of memory. Used from one event loop.

    Args:
        make: an engine for a configuration.
        config: the first engine's.
        step_timeout: seconds after which a step that has not ended ends the process.
        engine_failed: called in the event loop when an engine is to be replaced: who else holds it lets go of it.
        engine_changed: called in the event loop with every engine that takes another's place.
    """

    def __init__(
        self,
        make: Callable[[EngineConfig], TideEngine],
        config: EngineConfig,
        *,
        step_timeout: float,
        engine_failed: Callable[[], None],
        engine_changed: Callable[[TideEngine], None],
    ) -> None:
        self._make = make
        self._config = config
        self._engine_failed = engine_failed
        self._engine_changed = engine_changed
        self._async_engine: AsyncEngine[TideEngine] | None = self._start()
        self._replacing = asyncio.Lock()
        threading.Thread(target=self._watch, args=(step_timeout,), name="tide-watchdog", daemon=True).start()

    @property
    def engine(self) -> TideEngine | None:
        """The engine as it is now, for reading facts about it; None while another takes its place."""
        return None if self._async_engine is None else self._async_engine.engine

    async def generate(self, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        """Wait for one request.

        Raises:
            Exception: whatever the engine raised, unless that ends the process or a smaller engine can do it.
        """
        return await self._retried(lambda engine: engine.generate(prompt, params))

    async def run(self, work: Callable[[TideEngine], Result]) -> Result:
        """``work`` in the engine's thread, between steps. Raises what it raises."""
        return await self._retried(lambda engine: engine.run(work))

    async def _retried(self, call: Callable[[AsyncEngine[TideEngine]], Awaitable[Result]]) -> Result:
        while True:
            async with self._replacing:
                used = self._async_engine
            assert used is not None  # it is replaced under the lock
            try:
                return await call(used)
            except Exception as error:
                cause = error.__cause__ if isinstance(error, EngineDeadError) and error.__cause__ else error
                if is_sticky(cause):
                    leave(f"fatal device error: {cause}")
                if not is_out_of_memory(cause) or not used.is_dead:
                    raise
                _release_frames(cause)
            del used
            await self._make_smaller(cause)

    async def _make_smaller(self, cause: BaseException) -> None:
        """Replace the failed engine, once for all requests that failed with it."""
        async with self._replacing:
            assert self._async_engine is not None
            if not self._async_engine.is_dead:
                return
            num_before = self._async_engine.engine.max_num_seqs
            if num_before == 1:
                raise cause
            self._config = dataclasses.replace(
                self._config,
                max_num_seqs=num_before // 2,
                max_num_batched_tokens=max(self._config.max_num_batched_tokens // 2, 1),
            )
            logger.warning(
                "out of memory with %d resident sequences, going on with %d: %s", num_before, num_before // 2, cause
            )
            await asyncio.sleep(0)  # the others that failed with it let go of it
            self._engine_failed()
            try:
                self._async_engine = None
                self._async_engine = await asyncio.to_thread(self._restart)
            except Exception as error:
                leave(f"no smaller engine can be made: {error}")
            self._engine_changed(self._async_engine.engine)

    def _restart(self) -> AsyncEngine[TideEngine]:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._start()

    def _start(self) -> AsyncEngine[TideEngine]:
        config = self._config
        return AsyncEngine(lambda: self._make(config))

    def _watch(self, step_timeout: float) -> None:
        pause = threading.Event()
        while not pause.wait(min(step_timeout / 4, 5.0)):
            engine = self._async_engine
            if engine is not None and engine.seconds_in_step > step_timeout:
                leave(f"a step has not ended in {step_timeout:g} s")


def _release_frames(error: BaseException) -> None:
    """Have the frames of a failed step let go of what it had allocated.

    Among them are those of other requests that failed with it: coroutines, which clearing would end.
    """
    trace = error.__traceback__
    while trace is not None:
        if not trace.tb_frame.f_code.co_flags & inspect.CO_COROUTINE:
            with suppress(RuntimeError):  # it is running
                trace.tb_frame.clear()
        trace = trace.tb_next


def leave(reason: str) -> NoReturn:
    """End the process at once, so that Ray starts another in its place."""
    logger.error("leaving so that the actor is restarted: %s", reason)
    logging.shutdown()
    os._exit(1)
