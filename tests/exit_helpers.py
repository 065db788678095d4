"""Routers and engines with exits for tests: random or perfect heads, gates that never or always let tokens go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from references import loaded
from tide_ray import EngineConfig, TideEngine
from tide_ray.engine.cost_model import LaunchPlan
from tide_ray.engine.planner import LaunchPlanner
from tide_ray.exits.certificates import Certificate, guarantee_text
from tide_ray.exits.checkpoint import FINGERPRINT, Boundary, Routers, as_facts, fingerprint_of
from tide_ray.exits.checkpoint_files import weights_sha256
from tide_ray.exits.gates import NUM_PLACES, Gate, PrefillGate
from tide_ray.exits.policies import ForcedExits
from tide_ray.exits.readouts import ExitHead, KVHead
from tide_ray.models.adapter import KVShape
from tide_ray.models.loading import LoadedModel

NUM_LAYERS = 4


def make_routers(
    model: LoadedModel,
    depths: Sequence[int],
    *,
    kv_policy: str = "fitted",
    is_identity: bool = False,
    bias: float = 0.0,
) -> Routers:
    """Routers of random weights (exit heads are identities with ``is_identity``); ``bias`` moves all gate logits."""
    config = model.model.config.get_text_config()
    shapes = _kv_shapes(model.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        boundaries = []
        for depth in depths:
            head = ExitHead(config.hidden_size)
            if is_identity:
                head.up.weight.data.copy_(torch.eye(config.hidden_size))
                head.up.bias.data.zero_()
            gate, prefill_gate = Gate(config.hidden_size, 16), PrefillGate(config.hidden_size, 16)
            gate.offset.fill_(bias)
            prefill_gate.up.weight.data[:, -NUM_PLACES:] = 0  # states decide, so that neighbours part
            boundary = Boundary(depth, head, gate, KVHead(config.hidden_size, shapes[depth:]), prefill_gate)
            boundary.thresholds = {"0.01": 0.9, "0.02": 0.5}
            boundary.score_quantiles = tuple(i / 100 for i in range(101))
            boundary.prefill_quantiles = tuple(i / 100 for i in range(101))
            boundaries.append(boundary)
    fingerprint = fingerprint_of(
        model, kv_policy=kv_policy, num_layers=config.num_hidden_layers, hidden_size=config.hidden_size
    )
    return Routers(boundaries, as_facts(fingerprint, label="test", shapes=shapes, training={}))


def _kv_shapes(model: PreTrainedModel) -> list[KVShape]:
    from tide_ray.models.adapter import Adapter

    return Adapter(model).kv_shapes


class FixedPlanner(LaunchPlanner):
    """Every boundary on, with given holds."""

    def __init__(self, num_boundaries: int, holds: Sequence[int] | None = None) -> None:
        super().__init__(None, [0.5] * num_boundaries, always=True)
        self.current = LaunchPlan((True,) * num_boundaries, tuple(holds or (1,) * num_boundaries))


def forced_engine(
    model: PreTrainedModel,
    depths: Sequence[int],
    shares: Sequence[float],
    *,
    kv_policy: str = "fitted",
    holds: Sequence[int] | None = None,
    is_identity: bool = False,
    prefill_thresholds: Sequence[float] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **config: Any,
) -> TideEngine:
    """An engine in which a seeded random share of tokens exits at each boundary; with ``prefill_thresholds`` prompt
    tokens stop there, too."""
    wrapped = loaded(model, tokenizer)
    routers = make_routers(wrapped, depths, kv_policy=kv_policy, is_identity=is_identity)
    values = {"dtype": "float32", "device": "cpu", "page_size": 4, "max_model_len": 96, "max_num_seqs": 4, **config}
    if prefill_thresholds is not None:
        values |= {"exits": "given", "prefill_share": 1.0}
    engine = TideEngine(wrapped, EngineConfig(**values), routers)
    assert engine.runner.exits is not None
    if prefill_thresholds is not None:
        engine.runner.exits.prefill_thresholds = list(prefill_thresholds)
    engine.runner.exits.policy = ForcedExits(shares, seed=5)
    engine.runner.planner = FixedPlanner(len(depths), holds)
    return engine


def make_certificate(checkpoint: Path, **changes: Any) -> Certificate:
    """A certificate for a saved checkpoint, as if certification had found it."""
    routers = Routers.load(checkpoint)
    values: dict[str, Any] = {
        "epsilon": 0.02,
        "delta": 0.05,
        "loss": "tokens",
        "thresholds": (0.9,) * len(routers.boundaries),
        "prefill_threshold": None,
        "prefill_tail": 32,
        "p_value_kind": "wsr",
        "p_value": 0.01,
        "num_prompts": 1000,
        "num_ordering_prompts": 100,
        "num_tested": 8,
        "mean_loss": 0.01,
        "exit_share": 0.2,
        "prefill_exit_share": 0.0,
        "saving": 0.1,
        "noise_floor": 0.0,
        "max_tokens": 32,
        "sources": ("prompts.jsonl",),
        "fingerprint": {name: getattr(routers.facts, name) for name in FINGERPRINT},
        "weights_sha256": weights_sha256(checkpoint),
    }
    certificate = Certificate(**{**values, **changes})
    return replace(certificate, guarantee=guarantee_text(certificate))
