"""What passes from stage to stage within a step: rows in a launch, rows that reach a stage, tokens to choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tide_ray.engine.lanes import Lane
from tide_ray.engine.rows import LaunchCache, RowBatch
from tide_ray.models.layer_calls import LayerCall


@dataclass(slots=True)
class Arrivals:
    """Rows that have reached a stage: lanes (decode lanes first), and their states ``[N, D]`` in the lanes' order."""

    lanes: list[Lane]
    hidden: Tensor


class Flow:
    """Rows in a launch. A launch from a graph needs neither embeddings nor calls, so they are made when asked for.

    Args:
        lanes: decode lanes first.
        start: makes states ``[1, N, D]`` in the lanes' order, and the model's call for each layer.
        hidden: states ``[N, D]`` that are there already, in place of those that ``start`` makes.
    """

    def __init__(
        self,
        lanes: list[Lane],
        rows: RowBatch,
        cache: LaunchCache,
        start: Callable[[], tuple[Tensor, list[LayerCall]]],
        hidden: Tensor | None = None,
    ) -> None:
        self.lanes = lanes
        self.rows = rows
        self.cache = cache
        self.start = start
        self._hidden = hidden
        self._calls: list[LayerCall] | None = None

    @property
    def hidden(self) -> Tensor:
        """States ``[N, D]``. Where a graph made them they last until the next launch."""
        if self._hidden is None:
            self._start()
        assert self._hidden is not None
        return self._hidden

    @hidden.setter
    def hidden(self, states: Tensor) -> None:
        self._hidden = states

    @property
    def calls(self) -> list[LayerCall]:
        """How the model calls each layer for these rows."""
        if self._calls is None:
            self._start()
        assert self._calls is not None
        return self._calls

    def _start(self) -> None:
        states, self._calls = self.start()
        if self._hidden is None:
            self._hidden = states[0]


@dataclass(frozen=True, slots=True)
class Leaving:
    """Tokens to choose now: ``states`` ``[n, D]`` go through the model's final norm and head.

    ``lanes``: each token's; ``num_drafts``: how many drafts of its sequence come before it.
    """

    lanes: list[Lane]
    states: Tensor
    depth: int
    num_drafts: list[int]
