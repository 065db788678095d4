"""How attention inside a model's own layers reaches ours: the cache that layers are given, and two ways to it.

Layers call the function that is registered here with transformers' attention interface, or, in older models, torch's
``scaled_dot_product_attention``, which a torch function mode sends to the same place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tide_kernels.decoder_layer import Places
from tide_ray.types import UserError

ATTENTION_NAME = "tide_ray"
ROWS_ARGUMENT = "tide_cache"


def attention_scale(query: Tensor, scale: float | None) -> float:
    """The factor on the scores of queries ``[..., d]``: one over the root of their width unless a layer gives one."""
    return query.shape[-1] ** -0.5 if scale is None else scale


class RowCache(Cache, ABC):
    """What a layer is given in place of a key/value cache: it stores the rows' K/V and attends for them.

    Being a transformers ``Cache`` only satisfies type checks in modelling code; no K/V passes through its base class.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """No past as far as the model's own code is concerned: positions are always given."""
        return 0

    @abstractmethod
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store K/V ``[1, H_kv, N, d]`` of the rows for one layer and return them."""

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, softcap: float, window: int
    ) -> Tensor:
        """Attention of the rows over their sequences in the layer stored last: ``[1, H, N, d]`` -> ``[1, N, H, d]``."""

    def decode_places(self, layers: Sequence[int]) -> Places | None:
        """Where ``update`` and ``attend`` of layers would write and read, when all rows attend row by row to pages."""
        return None


class LayerStopped(Exception):
    """Leaves a layer once its K/V are known."""


class KeyValueTap(RowCache):
    """A row cache that keeps the K/V a layer would store, and ends the layer there."""

    def __init__(self) -> None:
        super().__init__()
        self.key_value: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.key_value = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        return key_states, value_states

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, softcap: float, window: int
    ) -> Tensor:
        raise LayerStopped


class DirectAttention(TorchFunctionMode):
    """Sends torch's scaled_dot_product_attention to ours, for models that call it without the attention interface."""

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self._cache = cache

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        out = self._cache.attend(*args[:3], scale=kwargs.get("scale"), softcap=0.0, window=0)
        return out.transpose(1, 2)


def _interface_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers' attention interface calls from inside a layer."""
    if kwargs.get("s_aux") is not None:
        raise UserError(f"model: {type(module).__name__} uses attention sinks, which are not supported")
    cache: RowCache = kwargs[ROWS_ARGUMENT]
    out = cache.attend(query, key, value, scale=scaling, softcap=softcap or 0.0, window=sliding_window or 0)
    return out, None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _interface_attention)
