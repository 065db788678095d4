"""Linear layers with weights laid out once for the CPU's matrix kernels, instead of at every call.

oneDNN reorders a bfloat16 weight matrix into blocks before each product; at decode sizes that costs as much memory
traffic as the product itself. Packing it once makes a cold 1536 x 576 layer 1.4x faster at 64 rows on a CPU with
AVX-512 BF16, and never slower. float32 is left alone: its products then round as HuggingFace's do.

With few rows a kernel of ours reads the same packed weights where it knows how they lie.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor, nn

from tide_kernels.few_rows import few_rows_linear
from tide_kernels.layer_vectors import TILE_OUTPUTS

FEW_ROWS = 4
"""Rows up to which reading the weights takes longer than multiplying them."""


class PackedLinear(nn.Module):
    """``nn.Linear`` for inference over a packed copy of the weight, which is ``[out_features, in_features]``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self._tiles = _tiles(self._packed, linear.weight) if linear.weight.dtype == torch.bfloat16 else None

    def forward(self, rows: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        if self._tiles is not None and rows.numel() <= FEW_ROWS * self.in_features:
            return few_rows_linear(rows, self._tiles, self.bias)
        return torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")


def _tiles(packed: Tensor, weight: Tensor) -> Tensor | None:
    """The packed weight's own memory as ``few_rows_linear`` takes it; None where oneDNN lays weights out otherwise."""
    num_outputs, num_inputs = weight.shape
    num_bytes = torch.ops.mkldnn._nbytes(packed)
    if num_outputs % TILE_OUTPUTS or num_inputs % 2 or num_bytes != 2 * weight.numel():
        return None
    memory = (ctypes.c_int16 * weight.numel()).from_address(torch.ops.mkldnn.data_ptr(packed))
    tiles = torch.from_numpy(np.ctypeslib.as_array(memory)).view(torch.bfloat16)
    tiles = tiles.view(num_outputs // TILE_OUTPUTS, num_inputs // 2, TILE_OUTPUTS, 2)
    is_as_known = torch.equal(tiles.permute(0, 2, 1, 3).reshape(weight.shape), weight.detach())
    return tiles if is_as_known else None


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
