"""Run any decoder-only transformers model over packed rows, through the model's own modules.

A forward pass is cut into three parts, none of which knows an architecture:

- ``prologue``: the backbone's own forward with every layer replaced by a recorder. It yields the state before layer 0
  and, for each layer, the arguments that the model would have passed to it (rotary tables, masks, cache).
- ``run_layer``: the model's own layer on packed rows ``[1, N, D]``; attention reaches ours through the registered
  attention interface, or, for models that call torch's attention directly, through a torch function mode.
- ``epilogue``: the modules that the backbone applies after its last layer, then the causal LM's own forward around a
  stub backbone, so that logit scales, soft-caps and tied heads are the model's own code.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tide_ray.models.fused_layer import FusedLayer, run_in_one_call
from tide_ray.models.layer_calls import LayerCall, are_alike, selected_calls
from tide_ray.models.row_cache import (
    ATTENTION_NAME,
    ROWS_ARGUMENT,
    DirectAttention,
    KeyValueTap,
    LayerStopped,
    RowCache,
)
from tide_ray.types import UserError


@dataclass(frozen=True, slots=True)
class KVShape:
    """K/V of one layer: number of K/V heads and their width."""

    num_heads: int
    head_dim: int


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes its call, returns its input. Other attributes are the layer's own."""

    def __init__(self, layer: nn.Module, calls: list[LayerCall], returns_tuple: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)
        self._calls = calls
        self._returns_tuple = returns_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._calls.append(LayerCall(args, kwargs))
        return (hidden_states, None) if self._returns_tuple else hidden_states


class _FixedBackbone(nn.Module):
    """Stands in for the backbone when only the head is wanted: returns the normed states it was given."""

    def __init__(self, output_type: type[Any]) -> None:
        super().__init__()
        self.states: Tensor | None = None
        self._output_type = output_type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._output_type(last_hidden_state=self.states)


def _shadow(module: nn.Module, **replaced: nn.Module) -> nn.Module:
    """A copy of ``module`` that shares every parameter and submodule but the replaced ones."""
    shadow = copy.copy(module)
    shadow._modules = {**module._modules, **replaced}
    return shadow


def _replace_at(module: nn.Module, path: list[str], replacement: nn.Module) -> nn.Module:
    """A shadow of ``module`` in which the submodule at ``path`` is ``replacement``."""
    name, *rest = path
    child = _replace_at(module.get_submodule(name), rest, replacement) if rest else replacement
    return _shadow(module, **{name: child})


class Adapter:
    """Packed-row access to one causal LM.

    Args:
        model: the loaded model; its attention implementation is taken over (``native_attention`` restores it).

    Raises:
        UserError: the model is not a decoder-only stack of layers this adapter can drive.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        self._backbone_path, self._layers_name = self._find_layers()
        self.backbone: nn.Module = model.get_submodule(self._backbone_path)
        self.layers: list[nn.Module] = list(self.backbone.get_submodule(self._layers_name).children())
        self.num_layers = len(self.layers)
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.fused_layers: dict[int, FusedLayer] = {}  # in place of the model's own
        self._uses_interface = bool(getattr(model, "_supports_attention_backend", False))
        if self.config._attn_implementation == ATTENTION_NAME:  # taken over by an earlier adapter
            model.set_attn_implementation("eager")
        self._probe()
        self._build_shadows()
        self._take_over_attention()

    # ---- finding the parts ----

    def _find_layers(self) -> tuple[str, str]:
        count = self.config.num_hidden_layers
        kind = type(self.model).__name__
        for name, module in self.model.named_modules():  # outer modules come before what they hold
            if isinstance(module, nn.ModuleList) and len(module) == count:
                path, _, layers_name = name.rpartition(".")
                return path, layers_name
        raise UserError(f"model: {kind} has no list of {count} decoder layers, so it cannot be run layer by layer")

    def _probe(self) -> None:
        """One tiny native forward: K/V shapes, whether layers return tuples, what follows the last layer."""
        tail: list[tuple[str, nn.Module, Tensor]] = []
        seen: dict[str, Any] = {"tuple": False, "done": False}

        def after_last_layer(_module: nn.Module, _args: Any, output: Any) -> None:
            seen["tuple"], seen["done"] = isinstance(output, tuple), True

        def note_tail(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if seen["done"] and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                    tail.append((name, module, output))

            return hook

        handles = [self.layers[-1].register_forward_hook(after_last_layer)]
        handles += [
            child.register_forward_hook(note_tail(name))
            for name, child in self.backbone.named_children()
            if name != self._layers_name
        ]
        ids = torch.tensor([[1, 2, 3]], device=self.device) % self.config.vocab_size
        try:
            output = self.backbone(input_ids=ids, use_cache=True)
        finally:
            for handle in handles:
                handle.remove()
        self._output_type = type(output)
        self._returns_tuple = seen["tuple"]
        self._tail = [(name, module) for name, module, _ in tail]
        cache = output.cache if hasattr(output, "cache") else getattr(output, "past_key_values", None)
        self.kv_shapes = self._kv_shapes(cache)
        if tail and not torch.equal(tail[-1][2], output.last_hidden_state):
            raise UserError(
                f"model: {type(self.model).__name__} does more after its last layer than apply "
                f"{', '.join(name for name, _ in self._tail)}"
            )

    def _kv_shapes(self, cache: Any) -> list[KVShape]:
        kind = type(self.model).__name__
        pairs: list[tuple[Any, Any]] = [
            (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in getattr(cache, "layers", ())
        ]
        if len(pairs) != self.num_layers or any(keys is None or values is None for keys, values in pairs):
            raise UserError(f"model: {kind} keeps no key/value cache for each layer (state-space or shared caches)")
        shapes = []
        for keys, values in pairs:
            if keys.ndim != 4 or keys.shape != values.shape:
                raise UserError(f"model: {kind} has a cache with unlike keys and values (MLA or linear attention)")
            shapes.append(KVShape(keys.shape[1], keys.shape[3]))
        return shapes

    def _build_shadows(self) -> None:
        self._calls: list[LayerCall] = []
        recorders = nn.ModuleList(_Recorder(layer, self._calls, self._returns_tuple) for layer in self.layers)
        identities = {name: nn.Identity() for name, _ in self._tail}
        self._prologue = _shadow(self.backbone, **{self._layers_name: recorders, **identities})
        config = copy.copy(self.config)
        config._attn_implementation_internal = ATTENTION_NAME  # no mask is built for an attention of this name
        self._prologue.__dict__["config"] = config
        # transformers renamed the argument within version 5.
        parameters = inspect.signature(self.backbone.forward).parameters
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self._head_input = _FixedBackbone(self._output_type)
        self._head = _replace_at(self.model, self._backbone_path.split("."), self._head_input)
        self._takes_kwargs = [
            any(p.kind is p.VAR_KEYWORD for p in inspect.signature(layer.forward).parameters.values())
            for layer in self.layers
        ]

    @property
    def running_layers(self) -> list[nn.Module]:
        """What runs each layer: its own module, or the fused one in its place."""
        return [self.fused_layers.get(index, layer) for index, layer in enumerate(self.layers)]

    @functools.cached_property
    def calls_are_by_row(self) -> bool:
        """Whether ``selected_calls`` gives what a ``prologue`` of the selected rows would."""
        ids = torch.arange(1, 6, device=self.device) % self.config.vocab_size
        positions = torch.tensor([0, 3, 7, 2, 9], device=self.device)
        index = torch.tensor([1, 2, 4], device=self.device)
        all_rows, some_rows = KeyValueTap(), KeyValueTap()
        _, calls = self.prologue(ids, positions, all_rows)
        selected = selected_calls(calls, index, num_rows=len(ids), cache=all_rows, new_cache=some_rows)
        _, expected = self.prologue(ids[index], positions[index], some_rows)
        return all(are_alike((a.args, a.kwargs), (b.args, b.kwargs)) for a, b in zip(selected, expected, strict=True))

    # ---- attention seam ----

    def _take_over_attention(self) -> None:
        if self._uses_interface:
            self.model.set_attn_implementation(ATTENTION_NAME)
        elif self.config._attn_implementation != "sdpa":
            raise UserError(f"model: {type(self.model).__name__} calls neither the attention interface nor torch's")

    @contextmanager
    def native_attention(self) -> Iterator[None]:
        """The model as transformers would run it, for comparisons."""
        if self._uses_interface:
            self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self._take_over_attention()

    # ---- the three parts of a forward pass ----

    def prologue(self, token_ids: Tensor, positions: Tensor, cache: RowCache) -> tuple[Tensor, list[LayerCall]]:
        """State before layer 0, ``[1, N, D]``, and how the model calls each layer.

        ``token_ids`` and ``positions`` are long ``[N]``.
        """
        self._calls.clear()
        output = self._prologue(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=True,
            **{self._cache_argument: cache},
        )
        return output.last_hidden_state, list(self._calls)

    def run_layer(self, index: int, hidden: Tensor, call: LayerCall, cache: RowCache) -> Tensor:
        """Layer ``index`` on packed rows ``[1, N, D]`` -> ``[1, N, D]``."""
        if index in self.fused_layers:
            fused: Tensor = self.fused_layers[index](hidden, call, cache)
            return fused
        kwargs = {**call.kwargs, ROWS_ARGUMENT: cache} if self._takes_kwargs[index] else call.kwargs
        mode = nullcontext() if self._uses_interface else DirectAttention(cache)
        with mode:
            output = self.layers[index](hidden, *call.args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def run_layers(self, layers: Sequence[int], hidden: Tensor, calls: Sequence[LayerCall], cache: RowCache) -> Tensor:
        """Layers one after another on packed rows; ``calls`` are those of all the model's layers."""

        def kind(layer: int) -> tuple[object, ...]:
            fused = self.fused_layers.get(layer)
            if fused is None or fused.decode_weights is None:
                return (layer,)
            return fused.decode_weights.kind, id(calls[layer].kwargs["position_embeddings"])

        for _, group in itertools.groupby(layers, kind):
            members = list(group)
            fused = [self.fused_layers[layer] for layer in members if layer in self.fused_layers]
            together = run_in_one_call(fused, hidden, calls[members[0]], cache) if fused else None
            if together is not None:
                hidden = together
                continue
            for layer in members:
                hidden = self.run_layer(layer, hidden, calls[layer], cache)
        return hidden

    def keys_values(self, index: int, hidden: Tensor, call: LayerCall, tap: KeyValueTap) -> tuple[Tensor, Tensor]:
        """K and V ``[N, H_kv, d]`` that layer ``index`` would store for states ``[1, N, D]``; the rest does not run.

        ``call`` must come from a ``prologue`` with ``tap`` as its cache.
        """
        tap.key_value = None
        with suppress(LayerStopped):
            self.run_layer(index, hidden, call, tap)
        assert tap.key_value is not None, "the layer stored no K/V before it attended"
        return tap.key_value

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Pre-norm state after the last layer ``[..., D]`` -> the state that the head takes."""
        for _, module in self._tail:
            hidden = module(hidden)
        return hidden

    def head(self, states: Tensor) -> Tensor:
        """Normed states ``[1, N, D]`` -> logits ``[N, V]``, with the model's own scale and soft-cap."""
        self._head_input.states = states
        output = self._head(input_ids=None, inputs_embeds=states, use_cache=False)
        self._head_input.states = None
        return output.logits[0]
