"""A model behind a Ray Serve handle, as the front sees it.

A request whose replica died before it gave anything is sent to another one; generating has no side effects.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

import grpc
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from tide_ray.serve.backend import Delta, ModelFacts
from tide_ray.serve.calls import Call
from tide_ray.serve.errors import ENGINE_DEAD, INTERNAL, UNAVAILABLE, Failure
from tide_ray.serve.mailbox import Label, Mailbox, unpacked
from tide_ray.types import RequestOutput

logger = logging.getLogger("tide_ray.serve")

TRIES = 3
ALIVE_SECONDS = 10.0


class HandleBackend:
    """Made and used in the replica's event loop.

    Args:
        handle: of the model's deployment.
        mailbox: the front's.
    """

    def __init__(self, handle: DeploymentHandle[Any], mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        # Through gRPC, without Ray's object references, and without a thread of its own: in Ray 2.60 those cost several
        # times as much CPU time for each chunk of a stream.
        if not handle.is_initialized:
            handle._init(_run_router_in_separate_loop=False)
        self._handle = handle.options(_by_reference=False, response_serialization="pickle")

    async def facts(self) -> ModelFacts | Failure:
        return await self._unary("facts")

    async def is_alive(self) -> bool:
        try:
            async with asyncio.timeout(ALIVE_SECONDS):
                return bool(await self._handle.is_alive.remote())
        except BackPressureError:
            return True  # it has too much to do
        except (RayError, DeploymentUnavailableError, grpc.aio.AioRpcError, TimeoutError):
            return False

    async def generate(self, call: Call) -> list[RequestOutput] | Failure:
        return await self._unary("generate", call)

    async def stream(self, call: Call) -> AsyncGenerator[list[Delta] | Failure]:
        failure = UNAVAILABLE
        for attempt in range(TRIES):
            await asyncio.sleep(attempt)
            has_started = has_ended = False
            address = await self._mailbox.address()
            with self._mailbox.expecting() as (number, queue):
                label = None if address is None else Label(address, number)
                response = cast(Any, self._handle.options(stream=True)).stream.remote(call, label)
                try:
                    async with aclosing(unpacked(response, queue)) as items:
                        async for item in items:
                            if item == ENGINE_DEAD and not has_started:
                                raise _EngineDeadError
                            has_started = True
                            yield item
                    has_ended = True
                    return
                except Exception as error:
                    has_ended = True
                    failure = _failure(error)
                    if has_started or not _may_try_again(error):
                        yield failure
                        return
                finally:
                    if not has_ended:
                        response.cancel()
        yield failure

    async def _unary(self, method: str, *args: Any) -> Any:
        failure = UNAVAILABLE
        for attempt in range(TRIES):
            await asyncio.sleep(attempt)
            response = getattr(self._handle, method).remote(*args)
            try:
                result = await response
                if result == ENGINE_DEAD:
                    raise _EngineDeadError
                return result
            except asyncio.CancelledError:
                response.cancel()
                raise
            except Exception as error:
                failure = _failure(error)
                if not _may_try_again(error):
                    return failure
        return failure


class _EngineDeadError(Exception):
    """A replica answered that its engine is dead; another one may not be."""


def _may_try_again(error: Exception) -> bool:
    if isinstance(error, grpc.aio.AioRpcError):  # of which Ray Serve makes no error of its own
        return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    return isinstance(error, (RayActorError, DeploymentUnavailableError, _EngineDeadError))


def _failure(error: Exception) -> Failure:
    if isinstance(error, _EngineDeadError):
        return ENGINE_DEAD
    if isinstance(error, BackPressureError):
        return Failure(429, "the server has as many requests as it takes", "server_overloaded", retry_after=2)
    if _may_try_again(error):
        return UNAVAILABLE
    logger.error("a replica failed: %s", type(error).__name__)
    return INTERNAL
