"""Parity self-test: the engine's packed rows against the model's own forward, at load, on short random prompts.

Two sequences of unlike length are prefilled together, then each gets decode steps. Every part starts from the native
model's own state, so that the part that differs is the part that is named and roundings do not add up. A model that
differs is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tide_ray.engine.kv_cache import KVCache
from tide_ray.engine.rows import LaunchCache, RowBatch, RowSpan, attends_by_row, build_rows
from tide_ray.models.adapter import Adapter
from tide_ray.types import UserError

PAGE_SIZE = 4
LENGTHS = (13, 8)
NUM_DECODE = 2
# Relative error of a row (norm of the difference over norm) that rounding alone can reach; a wrong part gives about 1.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@torch.inference_mode()
def selfcheck(adapter: Adapter) -> set[int]:
    """Compare; returns the windows that attention was asked for, 0 among them where it was asked for all tokens.

    Raises:
        UserError: naming the model class and the first part that differs from ``model.forward``.
    """
    generator = torch.Generator().manual_seed(0)
    vocab = adapter.config.vocab_size
    prompts = [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in LENGTHS]
    native = [_native_states(adapter, prompt) for prompt in prompts]
    windows: set[int] = set()
    packed = _packed_states(adapter, prompts, native, windows)
    tolerance = TOLERANCE[adapter.dtype]
    names = ["embedding or positions", *(f"layer {i}" for i in range(adapter.num_layers)), "final norm", "head"]
    for part, name in enumerate(names):
        for row, (reference, ours) in enumerate(zip(native, packed, strict=True)):
            for kind, begin, end in (("prefill", 0, -NUM_DECODE), ("decode", -NUM_DECODE, None)):
                expected, got = reference[part][begin:end].float(), ours[part][begin:end].float()
                errors = (expected - got).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)
                # In half precision a few rows may go to another expert than natively, where two experts' scores tie.
                error = errors.max() if adapter.dtype == torch.float32 else errors.median()
                if not error <= tolerance:
                    raise UserError(
                        f"model: {type(adapter.model).__name__} differs from its own forward at the {name} in {kind} "
                        f"(relative error {error:.2g}, sequence {row}); this architecture is not supported"
                    )
    return windows


class _WatchedCache(LaunchCache):
    """Notes the windows that it is asked for."""

    def __init__(self, pools: KVCache, rows: RowBatch, windows: set[int]) -> None:
        super().__init__(pools, rows)
        self._windows = windows

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, softcap: float, window: int
    ) -> Tensor:
        self._windows.add(window)
        return super().attend(query, key, value, scale=scale, softcap=softcap, window=window)


def _native_states(adapter: Adapter, prompt: list[int]) -> list[Tensor]:
    """The model's own states at every boundary, the normed state and the logits, each ``[T, ...]``."""
    states: list[Tensor] = []

    def before(_module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        states.append((args[0] if args else kwargs["hidden_states"])[0].clone())

    def after(_module: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        states.append((output[0] if isinstance(output, tuple) else output)[0].clone())

    handles = [adapter.layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layer.register_forward_hook(after) for layer in adapter.layers]
    ids = torch.tensor([prompt], device=adapter.device)
    try:
        with adapter.native_attention():
            normed = adapter.backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
            boundaries = list(states)
            logits = adapter.model(input_ids=ids, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return [*boundaries, normed, logits]


def _packed_states(
    adapter: Adapter, prompts: list[list[int]], native: list[list[Tensor]], asked_windows: set[int]
) -> list[list[Tensor]]:
    """The same states through packed rows, each from the native one before: a chunked joint prefill, then decode."""
    pages_each = -(-max(LENGTHS) // PAGE_SIZE)
    pools = KVCache(
        adapter.kv_shapes,
        num_pages=pages_each * len(prompts),
        page_size=PAGE_SIZE,
        dtype=adapter.dtype,
        device=adapter.device,
    )
    numbers = torch.arange(pages_each * len(prompts), dtype=torch.int32).flip(0).view(len(prompts), -1).numpy()
    lengths = [len(prompt) - NUM_DECODE for prompt in prompts]
    cuts = [[(0, n // 2), (n // 2, n)] + [(n + i, n + i + 1) for i in range(NUM_DECODE)] for n in lengths]
    collected: list[list[list[Tensor]]] = [[] for _ in prompts]
    for step in range(2 + NUM_DECODE):
        spans = [
            RowSpan.run(prompt[begin:end], begin, pages, is_decode=step >= 2)
            for prompt, pages, (begin, end) in zip(prompts, numbers, (cut[step] for cut in cuts), strict=True)
        ]
        windows = [slice(begin, end) for begin, end in (cut[step] for cut in cuts)]
        given = [
            torch.cat([part[window] for part, window in zip(parts, windows, strict=True)])
            for parts in zip(*native, strict=True)
        ]
        by_row = attends_by_row(adapter.device, adapter.dtype)
        rows = build_rows(spans, PAGE_SIZE, adapter.device, by_row=by_row)
        states = _launch(adapter, _WatchedCache(pools, rows, asked_windows), rows, given)
        row = 0
        for index, span in enumerate(spans):
            collected[index].append([state[row : row + len(span.token_ids)] for state in states])
            row += len(span.token_ids)
    return [[torch.cat(parts) for parts in zip(*launches, strict=True)] for launches in collected]


def _launch(adapter: Adapter, cache: LaunchCache, rows: RowBatch, given: list[Tensor]) -> list[Tensor]:
    """What each part makes of ``given``, the native states of the rows: one ``[N, ...]`` per boundary."""
    hidden, calls = adapter.prologue(rows.token_ids, rows.positions, cache)
    states = [hidden[0]]
    for layer, call in enumerate(calls):
        states.append(adapter.run_layer(layer, given[layer][None], call, cache)[0])
    return [*states, adapter.final_norm(given[-3][None])[0], adapter.head(given[-2][None])]
