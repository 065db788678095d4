"""What every layer of a model has to say, before anything is fitted: the first thing a report shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tide_ray.calibrate.corpus import Example, leading
from tide_ray.calibrate.trace import Tracer
from tide_ray.engine.draws import argmax
from tide_ray.engine.kv_cache import KVCache
from tide_ray.models.adapter import Adapter

MAX_ROWS = 256
"""Each is read through the LM head at every depth."""
CHUNK = 64


@torch.inference_mode()
def depth_profile(adapter: Adapter, pools: KVCache, examples: Sequence[Example]) -> dict[str, list[float]]:
    """Lists over all depths but the last, ``depth``: ``lens_agreement``, the share of judged rows whose top-1 without
    an exit head is full depth's, and ``cosine``, mean cosine of their state with the final one."""
    depths = list(range(1, adapter.num_layers))
    right, cosines, num_rows = np.zeros(len(depths)), np.zeros(len(depths)), 0
    for rows in Tracer(adapter, pools, None, depths).trace(leading(examples, MAX_ROWS)):
        judged = torch.from_numpy(np.flatnonzero(rows.is_judged)[: MAX_ROWS - num_rows])
        num_rows += len(judged)
        for index in judged.split(CHUNK):
            expected = argmax(_logits(adapter, rows.final[index]))
            for place, depth in enumerate(depths):
                right[place] += int((argmax(_logits(adapter, rows.states[depth][index])) == expected).sum())
        cosines += [float(rows.cosines[depth][judged].sum()) for depth in depths]
    return {
        "depth": depths,
        "lens_agreement": [round(share, 4) for share in right / num_rows],
        "cosine": [round(mean, 4) for mean in cosines / num_rows],
    }


def _logits(adapter: Adapter, states: torch.Tensor) -> torch.Tensor:
    return adapter.head(adapter.final_norm(states[None]))
