"""Gate features and scores of judged rows: what a gate would see and say of them in the engine."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from tide_ray.calibrate.judge import Judged
from tide_ray.exits.checkpoint import Boundary
from tide_ray.exits.gates import Gate
from tide_ray.exits.readouts import ExitHead, gate_for_inference
from tide_ray.models.adapter import Adapter

CHUNK = 2048


class Sureness:
    """Reads exit heads over the shortlist.

    Args:
        heads: exit heads as the engine runs them, by depth.
        shortlist: rows of the LM head, ``[tokens, D]``; None: gates see the state alone.
    """

    def __init__(self, adapter: Adapter, heads: Mapping[int, ExitHead], shortlist: Tensor | None) -> None:
        self._adapter = adapter
        self._heads = heads
        self._shortlist = shortlist
        self._reader: Gate | None = None
        if shortlist is not None:
            reader = Gate(shortlist.shape[1], 1, len(shortlist))
            reader.shortlist = self._linear()
            self._reader = gate_for_inference(reader, adapter.device, adapter.dtype)

    def features(self, depth: int, judged: Judged) -> Tensor | None:
        """Features of the judged rows, ``[N, 3]``; None without a shortlist."""
        if self._reader is None:
            return None
        parts = []
        with torch.no_grad():
            for states in judged.rows.take(f"state_{depth}").to(self._adapter.device).split(CHUNK):
                parts.append(self._reader.features(self._adapter.final_norm(self._heads[depth](states)[None])[0]))
        return torch.cat(parts).cpu()

    def give_shortlist(self, gate: Gate) -> None:
        """Put the shortlist into a trained gate."""
        if self._shortlist is not None:
            gate.shortlist, gate.num_tokens = self._linear(), len(self._shortlist)

    def logits(self, boundary: Boundary, judged: Judged) -> Tensor:
        """The gate's logits of the judged rows."""
        with torch.no_grad():
            states = judged.rows.take(f"state_{boundary.depth}")
            return boundary.gate.logits(states, self.features(boundary.depth, judged))

    def scores(self, boundary: Boundary, judged: Judged) -> np.ndarray:
        """The gate's scores of the judged rows."""
        return self.logits(boundary, judged).sigmoid().numpy()

    def _linear(self) -> nn.Linear:
        assert self._shortlist is not None
        num_tokens, width = self._shortlist.shape
        linear = nn.Linear(width, num_tokens, bias=False)
        linear.weight.data.copy_(self._shortlist)
        return linear.requires_grad_(False)
