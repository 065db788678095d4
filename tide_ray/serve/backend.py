"""What the front and a model say to each other, whether they share a process or not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tide_ray.serve.calls import Call
from tide_ray.serve.errors import Failure
from tide_ray.types import RequestOutput


@dataclass(frozen=True, slots=True)
class Limits:
    """What the front allows; None leaves it to the model."""

    max_prompt_tokens: int | None = None
    max_completion_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a client may know of a model. ``epsilons``: disagreements that its routers have a certificate for."""

    created: int
    fingerprint: str
    max_model_len: int
    num_layers: int
    boundaries: tuple[int, ...]
    policy: str
    epsilons: tuple[float, ...]


class Delta(NamedTuple):
    """What is new of the answers to prompt ``prompt_index`` of a call."""

    prompt_index: int
    output: RequestOutput


class Backend(Protocol):
    """A model as the front sees it: in this process, or behind a Ray Serve handle."""

    async def facts(self) -> ModelFacts | Failure: ...
    async def is_alive(self) -> bool: ...
    async def generate(self, call: Call) -> list[RequestOutput] | Failure:
        """One output for each prompt, in order."""

    def stream(self, call: Call) -> AsyncIterator[list[Delta] | Failure]:
        """What is new, as it comes; a Failure is the last item. Closing it stops the answers."""
