"""RMS norms of a model in one kernel each, where they compute what the kernel computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tide_kernels.rms_norm import rms_norm, rms_norm_reference
from tide_kernels.vectors import MAX_LANES

PROBE_ROWS = 64
MAX_DIFFERING = 0.01
"""Share of a probe's numbers that may be rounded the other way, since sums are in another order."""


class FusedRMSNorm(nn.Module):
    """``rms_norm`` with the weight of the module it replaces."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, rows: Tensor) -> Tensor:
        """``[..., D]`` -> ``[..., D]``."""
        # Exit heads are refined through the final norm, and the kernel has no gradient.
        if rows.dtype != self.weight.dtype or (torch.is_grad_enabled() and rows.requires_grad):
            return rms_norm_reference(rows, self.weight, self.eps)
        return rms_norm(rows, self.weight, self.eps)


def fuse_norms(model: nn.Module) -> int:
    """Replace the 16-bit RMS norms in ``model`` that a probe shows to be plain ones; returns how many."""
    num_fused = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            fused = _fused(child)
            if fused is not None:
                setattr(parent, name, fused)
                num_fused += 1
    return num_fused


def norm_epsilon(module: nn.Module) -> float | None:
    """What a norm adds to the mean of squares, under either of its names; None where it has neither."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


def _fused(module: nn.Module) -> FusedRMSNorm | None:
    """A replacement for ``module``, or None: not all that is called RMSNorm has the weight and roundings of LLaMA's."""
    if isinstance(module, FusedRMSNorm) or not type(module).__name__.endswith("RMSNorm"):
        return None
    if list(module._parameters) != ["weight"]:
        return None
    weight, eps = module.weight, norm_epsilon(module)
    if not isinstance(weight, nn.Parameter) or weight.dtype == torch.float32 or eps is None:
        return None
    if weight.ndim != 1 or len(weight) % MAX_LANES:
        return None
    fused = FusedRMSNorm(weight, eps)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(PROBE_ROWS, len(weight), generator=generator) * torch.logspace(-4, 3, PROBE_ROWS)[:, None]
    with torch.inference_mode():
        try:
            rows = rows.to(weight.device, weight.dtype)
            expected, actual = module(rows), fused(rows)
        except Exception:  # a model's own code, of which only the name is known, or a compiler: then it stays
            return None
        if not isinstance(expected, Tensor):
            return None
        is_same = actual.dtype == expected.dtype and float((actual != expected).float().mean()) <= MAX_DIFFERING
        is_same = is_same and torch.allclose(actual.float(), expected.float(), rtol=2**-7, atol=1e-30)
    return fused if is_same else None
