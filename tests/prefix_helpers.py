"""Prompts that begin alike, and engines whose shared pages are watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from references import cached_nodes, loaded
from tide_ray import EngineConfig, TideEngine
from tide_ray.engine.kv_cache import KVCache
from tiny_models import VOCAB_SIZE, build_tiny_model

PAGE_SIZE = 4
LIMITS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "page_size": PAGE_SIZE, "max_model_len": 96}
NUM_SHARED = 22


def family(num: int, *, shared: int = NUM_SHARED, seed: int = 1, vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    """Prompts with the same first ``shared`` tokens and ends of their own, of 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> list[int]:
        return torch.randint(3, vocab_size, (count,), generator=generator).tolist()

    beginning = some(shared)
    return [beginning + some(1 + 3 * n % 9) for n in range(num)]


def make(architecture: str = "llama", **changes: Any) -> TideEngine:
    return TideEngine(loaded(build_tiny_model(architecture)), EngineConfig(**{**LIMITS, "max_num_seqs": 4, **changes}))


def cached(outputs: list[Any]) -> list[int]:
    return [output.num_cached_tokens for output in outputs]


@contextmanager
def shared_pages_guarded(engine: TideEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Fails on a write to a page that is computed and can be found; yields the number of writes that were checked."""
    num_writes = [0]
    pool = engine.scheduler.pool

    def checked(original: Callable[..., None], pages_at: int) -> Callable[..., None]:
        def write(self: KVCache, *args: Any) -> None:
            shared = {node.page for node in cached_nodes(pool) if node.is_computed}
            assert not shared & set(args[pages_at].tolist()), "a row wrote into a shared page"
            num_writes[0] += 1
            original(self, *args)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "write", checked(KVCache.write, 1))
        patch.setattr(KVCache, "write_layers", checked(KVCache.write_layers, 1))
        yield num_writes
