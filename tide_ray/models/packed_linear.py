"""Linear layers with weights laid out once for the CPU's matrix kernels, instead of at every call.

oneDNN reorders a bfloat16 weight matrix into blocks before each product; at decode sizes that costs as much memory
traffic as the product itself. Packing it once makes a cold 1536 x 576 layer 1.4x faster at 64 rows on a CPU with
AVX-512 BF16, and never slower. float32 is left alone: its products then round as HuggingFace's do.

A kernel of ours reads the same packed weights, where it knows how they lie, for the few rows of a decode step.
"""

from __future__ import annotations

import ctypes
import functools
import logging

import numpy as np
import torch
from torch import Tensor, nn

from tide_kernels.product_vectors import ROWS_AT_ONCE, TILE_PAIRS
from tide_kernels.tiled_linear import BLOCK_OUTPUTS, TiledWeights, tiled_linear, tiled_linear_reference
from tide_kernels.vectors import has_pair_products

# Rows up to which our products are no slower than oneDNN's. Measured on CPUs with AVX-512 BF16 and with AMX, where they
# always are and a row's numbers then never depend on how many there are. Without products of pairs ours only read
# weights faster.
DECODE_ROWS = 2**16 if has_pair_products() else 4

logger = logging.getLogger(__name__)


class PackedLinear(nn.Module):
    """``nn.Linear`` for inference over a packed copy of the weight, which is ``[out_features, in_features]``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        tiles = _tiles(self._packed, linear.weight) if linear.weight.dtype == torch.bfloat16 else None
        bias = None if linear.bias is None else linear.bias.detach()
        self.tiled = None if tiles is None else TiledWeights(tiles, bias)  # the same weights, for kernels of ours

    def forward(self, rows: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        if self.tiled is not None and rows.numel() <= DECODE_ROWS * self.in_features:
            return tiled_linear(rows, self.tiled)
        return torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")


def _tiles(packed: Tensor, weight: Tensor) -> Tensor | None:
    """The packed weight's own memory as ``tiled_linear`` takes it; None where oneDNN lays weights out otherwise."""
    if not kernels_work():
        return None
    num_outputs, num_inputs = weight.shape
    num_bytes = torch.ops.mkldnn._nbytes(packed)
    if num_inputs % 2 or num_bytes != 2 * weight.numel():
        return None
    memory = (ctypes.c_int16 * weight.numel()).from_address(torch.ops.mkldnn.data_ptr(packed))
    numbers = torch.from_numpy(np.ctypeslib.as_array(memory)).view(torch.bfloat16)
    for block in BLOCK_OUTPUTS:
        if num_outputs % block == 0:
            tiles = numbers.view(num_outputs // block, num_inputs // 2, block, 2)
            if torch.equal(tiles.permute(0, 2, 1, 3).reshape(weight.shape), weight.detach()):
                return tiles
    return None


@functools.cache
def kernels_work() -> bool:
    """Whether our products can be compiled here and are right; where not, oneDNN computes all, with a warning."""
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn(2, 2 * TILE_PAIRS, BLOCK_OUTPUTS[0], 2, generator=generator).bfloat16()
    rows = torch.randn(ROWS_AT_ONCE + 1, 4 * TILE_PAIRS, generator=generator).bfloat16()
    weights = TiledWeights(tiles, None)
    try:
        _ = torch.ops.mkldnn._nbytes, torch.ops.mkldnn.data_ptr  # how packed weights are found in memory
        actual = tiled_linear(rows, weights)
        torch.testing.assert_close(actual, tiled_linear_reference(rows, weights), rtol=0.02, atol=0.1)
    except Exception as error:  # a compiler's, of which there is no list
        logger.warning("products for few rows are left to oneDNN, as ours failed: %s", str(error).split("\n")[0])
        return False
    return True


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packing applies: bfloat16 on a CPU whose oneDNN computes in it."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack_linears(model: nn.Module) -> int:
    """Replace every plain ``nn.Linear`` in ``model``; returns how many. Untied weights are freed one by one."""
    num_packed = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
                num_packed += 1
    return num_packed
