"""Stages: the runs of layers between two boundaries, and the policy that cuts a model into them.

With routers there is a boundary at each calibrated depth. Policy ``full`` is one stage of all layers. Policy
``static`` is one stage of a fixed subset that every token runs: either the first ``exit_layer`` layers, or all but a
skipped set. A layer outside the stage does not run for any row, prompt rows included, so skipped layers need no K/V.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tide_ray.config import EngineConfig
from tide_ray.models.adapter import Adapter
from tide_ray.models.layer_calls import LayerCall
from tide_ray.models.row_cache import RowCache
from tide_ray.types import UserError, is_integer


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers that are run together, in order. ``depth``: layers a token has run when it leaves this stage."""

    name: str
    layers: tuple[int, ...]
    depth: int

    def run(self, adapter: Adapter, hidden: Tensor, calls: list[LayerCall], cache: RowCache) -> Tensor:
        """Run the stage's layers on packed rows ``[1, N, D]``."""
        return adapter.run_layers(self.layers, hidden, calls, cache)


def evenly_spaced_layers(num_layers: int, cost: float) -> tuple[int, ...]:
    """The layers that unified layer skipping keeps for a target cost (arXiv 2404.06954).

    ``round(cost * num_layers)`` layers, at least 2, evenly spaced, always with the first and the last layer, which
    carry the embedding into the residual stream and the residual stream to the head.
    """
    keep = max(2, round(cost * num_layers))
    if keep >= num_layers:
        return tuple(range(num_layers))
    return tuple(round(i * (num_layers - 1) / (keep - 1)) for i in range(keep))


def plan_stages(config: EngineConfig, num_layers: int, boundaries: Sequence[int] = ()) -> list[Stage]:
    """The stages of a policy, shallowest first. ``boundaries``: depths at which tokens may exit, rising.

    Raises:
        UserError: a depth or layer number that the model does not have.
    """
    if boundaries:
        cuts = [0, *boundaries, num_layers]
        runs = itertools.pairwise(cuts)
        return [Stage(f"stage_{n}", tuple(range(*run)), run[1]) for n, run in enumerate(runs)]
    if config.resolved_policy == "full":
        layers = tuple(range(num_layers))
    elif config.exit_layer is not None:
        if not 1 <= config.exit_layer <= num_layers:
            raise UserError(f"exit_layer must be from 1 to {num_layers}, got {config.exit_layer}")
        layers = tuple(range(config.exit_layer))
    elif config.static_cost is not None:
        layers = evenly_spaced_layers(num_layers, config.static_cost)
    else:
        for layer in config.skip_layers:
            if not is_integer(layer) or not 0 <= layer < num_layers:
                raise UserError(f"skip_layers must hold layers from 0 to {num_layers - 1}, got {layer!r}")
        layers = tuple(layer for layer in range(num_layers) if layer not in set(config.skip_layers))
        if not layers:
            raise UserError(f"skip_layers must leave at least one layer, got all {num_layers}")
    return [Stage(config.resolved_policy, layers, len(layers))]
