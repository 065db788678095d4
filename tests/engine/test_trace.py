"""What calibration records of whole sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from references import loaded
from tide_ray import EngineConfig, TideEngine
from tide_ray.calibrate.corpus import Example
from tide_ray.calibrate.trace import Tracer
from tide_ray.engine.rows import RowSpan, build_rows
from tide_ray.exits.rotary import find_rotary
from tiny_models import VOCAB_SIZE, build_tiny_model


def test_attention_that_rows_get_is_that_of_the_models_own_attention_weights() -> None:
    model = build_tiny_model("llama")
    engine = TideEngine(loaded(model), EngineConfig(dtype="float32", max_model_len=64, max_num_seqs=2))
    generator = torch.Generator().manual_seed(0)
    examples = [
        Example(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist(), first)
        for length, first in ((12, 8), (12, 5), (7, 0))
    ]
    adapter = engine.runner.adapter
    tracer = Tracer(adapter, engine.runner.pools, find_rotary(adapter), [1, 3])
    (rows,) = list(tracer.trace(examples, with_attention=True))
    assert rows.attention is not None
    assert rows.attention.shape == (31, adapter.num_layers - 1), "from the shallowest depth on"
    start = 0
    model.set_attn_implementation("eager")
    for example in examples:
        with torch.inference_mode(), adapter.native_attention():
            model.set_attn_implementation("eager")
            weights = model(torch.tensor([example.token_ids]), output_attentions=True, use_cache=False).attentions
        length = len(example.token_ids)
        for column, layer in enumerate(range(1, adapter.num_layers)):
            expected = weights[layer][0, :, example.first_judged :].mean((0, 1)) * length
            torch.testing.assert_close(rows.attention[start : start + length, column], expected, atol=1e-4, rtol=1e-3)
        start += length


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "mistral"])
def test_neighbours_of_one_length_attend_in_one_call_and_come_out_as_alone(kind: str) -> None:
    model = build_tiny_model(kind)
    engine = TideEngine(loaded(model), EngineConfig(dtype="float32", max_model_len=64, max_num_seqs=2))
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in (9, 9, 9, 4, 9)]
    spans = [RowSpan.run(one, 0, np.zeros(1, dtype=np.int32), is_decode=False) for one in ids]
    chunks = build_rows(spans, engine.config.page_size, torch.device("cpu")).chunks
    assert [(chunk.start, chunk.stop, chunk.count) for chunk in chunks] == [(0, 27, 3), (27, 31, 1), (31, 40, 1)]
    adapter = engine.runner.adapter
    tracer = Tracer(adapter, engine.runner.pools, None, [2])
    (together,) = tracer.trace([Example(one, 0) for one in ids])
    alone = [next(iter(tracer.trace([Example(one, 0)]))) for one in ids]
    torch.testing.assert_close(together.final, torch.cat([rows.final for rows in alone]), atol=1e-5, rtol=1e-5)
