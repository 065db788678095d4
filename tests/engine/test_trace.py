"""What calibration records of whole sequences."""

from __future__ import annotations

import torch

from references import loaded
from tide_ray import EngineConfig, TideEngine
from tide_ray.calibrate.corpus import Example
from tide_ray.calibrate.trace import Tracer
from tide_ray.exits.rotary import find_rotary
from tiny_models import VOCAB_SIZE, build_tiny_model


def test_attention_that_rows_get_is_that_of_the_models_own_attention_weights() -> None:
    model = build_tiny_model("llama")
    engine = TideEngine(loaded(model), EngineConfig(dtype="float32", max_model_len=64, max_num_seqs=2))
    generator = torch.Generator().manual_seed(0)
    examples = [
        Example(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist(), first)
        for length, first in ((12, 8), (7, 0))
    ]
    adapter = engine.runner.adapter
    tracer = Tracer(adapter, engine.runner.pools, find_rotary(adapter), [1, 3])
    (rows,) = list(tracer.trace(examples, with_attention=True))
    assert rows.attention is not None
    assert rows.attention.shape == (19, adapter.num_layers - 1), "from the shallowest depth on"
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
