"""The drift guard of an actor: some rows are answered at full depth as well, and a test says when exits must stop.

Which rows follows from their ids. Losses are tested in the order in which the rows came, which does not depend on them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from tide_ray.calibrate.drift import DriftTest, shadow_loss
from tide_ray.data.logs import JobLog
from tide_ray.engine.engine import TideEngine
from tide_ray.exits.certificates import Certificate
from tide_ray.types import Prompt, RequestOutput, SamplingParams

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowOptions:
    """``share`` of the rows is shadowed, chosen by ``seed``; a false alarm has a chance of ``delta`` at most."""

    share: float
    seed: int
    delta: float


def is_shadowed(row_id: str, options: ShadowOptions) -> bool:
    """Whether a row is one of those: a hash of its id and the seed, the same for every attempt and actor."""
    digest = hashlib.sha256(f"{options.seed}:{row_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < options.share * 2**64


class OrderedLosses:
    """Hands losses on in the order of their tickets, whenever they become known. ``test`` gets them."""

    def __init__(self, test: Callable[[float], None]) -> None:
        self._test = test
        self._num_drawn = 0
        self._next = 0
        self._known: dict[int, float | None] = {}  # behind one that is not known

    def ticket(self) -> int:
        self._num_drawn += 1
        return self._num_drawn - 1

    def settle(self, ticket: int, loss: float | None) -> None:
        """None: the ticket came to nothing."""
        self._known[ticket] = loss
        while self._next in self._known:
            known = self._known.pop(self._next)
            self._next += 1
            if known is not None:
                self._test(known)


class AnsweringEngine(Protocol):
    """What is used of an AsyncEngine, or of one that is guarded."""

    async def generate(self, prompt: Prompt, params: SamplingParams) -> RequestOutput: ...
    async def run(self, work: Callable[[TideEngine], Result]) -> Result: ...


class DriftGuard:
    """Watches one engine.

    Args:
        engine: runs the settings of ``certificate``.
    """

    def __init__(self, engine: AnsweringEngine, certificate: Certificate, options: ShadowOptions, log: JobLog) -> None:
        self._engine = engine
        self._log = log
        self._certificate = certificate
        self._options = options
        self._losses = OrderedLosses(self._add)
        self.test = DriftTest(certificate.epsilon, options.delta)

    async def answer(
        self, row_id: str, params: SamplingParams, generate: Callable[[], Awaitable[RequestOutput]]
    ) -> tuple[RequestOutput, float | None, bool]:
        """The row's answer, its loss where it is shadowed, and whether exits were still on when it was done."""
        if self.test.has_tripped or params.exit_policy == "full" or not is_shadowed(row_id, self._options):
            return await generate(), None, not self.test.has_tripped
        ticket = self._losses.ticket()
        loss: float | None = None
        try:
            output = await generate()
            if not output.error:
                loss = await self._loss(output, params)
        finally:
            self._losses.settle(ticket, loss)
        if self.test.has_tripped:
            await self._engine.run(TideEngine.stop_exits)
        return output, loss, not self.test.has_tripped

    def facts(self) -> dict[str, Any]:
        """For run records."""
        return {"share": self._options.share, **self.test.facts()}

    async def _loss(self, output: RequestOutput, params: SamplingParams) -> float:
        full = await self._engine.generate(output.prompt_token_ids, replace(params, exit_policy="full"))
        answers = output.outputs[0].token_ids, full.outputs[0].token_ids
        measure = partial(_measured, certificate=self._certificate, prompt_ids=output.prompt_token_ids, answers=answers)
        return await self._engine.run(measure)

    def _add(self, loss: float) -> None:
        had_tripped = self.test.has_tripped
        self.test.add(loss)
        if self.test.has_tripped and not had_tripped:
            self._log.warning("drift: more disagreement with full depth than certified, exits are off", **self.facts())


def _measured(
    engine: TideEngine, *, certificate: Certificate, prompt_ids: list[int], answers: tuple[list[int], list[int]]
) -> float:
    return shadow_loss(engine, certificate, prompt_ids, *answers)
