"""Router checkpoints: boundaries and what they were made for, saved and loaded. ``checkpoint_files`` has the folder.

``Routers.load`` refuses a checkpoint that was made for another model, dtype, K/V policy or chat template, naming the
field that differs, because thresholds hold for what they were calibrated on only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tide_ray.exits.certificates import Certificate
from tide_ray.exits.checkpoint_files import (
    FACTS_FILE,
    FORMAT,
    WEIGHTS_FILE,
    check_output_folder,
    identity_of,
    read_facts,
    weights_sha256,
    write_facts,
)
from tide_ray.exits.gates import Gate, PrefillGate
from tide_ray.exits.readouts import ExitHead, KVHead, for_inference, gate_for_inference
from tide_ray.messages import one_line
from tide_ray.models.adapter import KVShape
from tide_ray.models.loading import LoadedModel
from tide_ray.types import UserError

FINGERPRINT = ("model_fingerprint", "revision", "dtype", "kv_policy", "chat_template", "num_layers", "hidden_size")


@dataclass(slots=True)
class Boundary:
    """What was fitted at one depth. ``kv_head`` and ``prefill_gate`` are None where K/V could not be fitted.

    ``thresholds``: gate score from which exits were wrong at most this often on calibration prompts, by error level
    ("0.01" is 1 %); above 1 where no exit is good enough. ``score_quantiles``: 0th to 100th percentile of the gate's
    scores there; ``prefill_quantiles``: of the predicted damages of prompt tokens.
    """

    depth: int
    head: ExitHead
    gate: Gate
    kv_head: KVHead | None = None
    prefill_gate: PrefillGate | None = None
    thresholds: dict[str, float] = field(default_factory=dict)
    score_quantiles: tuple[float, ...] = ()
    prefill_quantiles: tuple[float, ...] = ()

    def exit_share(self, threshold: float) -> float:
        """Share of calibration tokens whose score reaches ``threshold``."""
        quantiles = self.score_quantiles
        return sum(score >= threshold for score in quantiles) / len(quantiles) if quantiles else 0.5

    def prefill_threshold(self, share: float) -> float:
        """Predicted damage below which this share of the calibration prompts' tokens lies."""
        return self.prefill_quantiles[round(share * (len(self.prefill_quantiles) - 1))]

    def ready(self, device: torch.device, dtype: torch.dtype) -> Boundary:
        """The boundary as the engine runs it. Takes over this one's modules."""
        made = {
            name: (gate_for_inference if isinstance(module, Gate) else for_inference)(module, device, dtype)  # type: ignore[arg-type]
            for name, module in self.modules().items()
        }
        return replace(self, **made)  # type: ignore[arg-type]

    def modules(self) -> dict[str, nn.Module]:
        """The networks it has, by name: ``head``, ``gate``, ``kv_head``, ``prefill_gate``."""
        named = {"head": self.head, "gate": self.gate, "kv_head": self.kv_head, "prefill_gate": self.prefill_gate}
        return {name: module for name, module in named.items() if module is not None}


@dataclass(frozen=True, slots=True)
class RouterFacts:
    """What a checkpoint says of itself. The first seven fields are its fingerprint (see ``FINGERPRINT``)."""

    model_fingerprint: str
    revision: str
    dtype: str
    kv_policy: str
    chat_template: str
    num_layers: int
    hidden_size: int
    label: str
    kv_shapes: tuple[tuple[int, int], ...]
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Routers:
    """Everything calibrated for one model, the shallowest boundary first, and what of it is certified."""

    boundaries: list[Boundary]
    facts: RouterFacts
    identity: str = ""
    certificates: list[Certificate] = field(default_factory=list)
    certification: dict[str, Any] = field(default_factory=dict)  # figures of the run that made them

    @property
    def depths(self) -> tuple[int, ...]:
        """Of the boundaries, shallowest first, in layers run."""
        return tuple(boundary.depth for boundary in self.boundaries)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the checkpoint: the folder appears complete or not at all; an existing checkpoint is replaced.

        Raises:
            UserError: ``folder`` exists and is not a router checkpoint.
        """
        path = Path(folder)
        check_output_folder(path)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.mkdir(parents=True)
        try:
            tensors: dict[str, Tensor] = {}
            entries = []
            for boundary in self.boundaries:
                prefix = f"depth_{boundary.depth}"
                for name, module in boundary.modules().items():
                    tensors |= {f"{prefix}.{name}.{key}": v.contiguous() for key, v in module.state_dict().items()}
                entries.append(
                    {
                        "depth": boundary.depth,
                        "modules": sorted(boundary.modules()),
                        "rank": boundary.head.rank,
                        "bottleneck": boundary.gate.down.out_features,
                        "shortlist": boundary.gate.num_tokens,
                        "thresholds": boundary.thresholds,
                        "score_quantiles": list(boundary.score_quantiles),
                        "prefill_quantiles": list(boundary.prefill_quantiles),
                    }
                )
            save_file(tensors, unfinished / WEIGHTS_FILE)
            facts = {"format": FORMAT, **asdict(self.facts), "boundaries": entries}
            write_facts(unfinished / FACTS_FILE, facts)
            if path.exists():
                shutil.rmtree(path)
            unfinished.rename(path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.identity = identity_of(path)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Routers:
        """Read a checkpoint.

        Raises:
            UserError: the folder is not a complete checkpoint of this format.
        """
        path = Path(folder)
        raw = read_facts(path)
        try:
            facts = RouterFacts(
                **{f.name: raw[f.name] for f in fields(RouterFacts) if f.name != "kv_shapes"},
                kv_shapes=tuple((int(heads), int(width)) for heads, width in raw["kv_shapes"]),
            )
            tensors = load_file(path / WEIGHTS_FILE)
            boundaries = [_boundary(entry, facts, tensors) for entry in raw["boundaries"]]
            certificates = [Certificate.from_json(entry) for entry in raw.get("certificates", [])]
        except (KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
            reason = one_line(error)
            raise UserError(f"exits: a damaged router checkpoint in {str(path)!r} ({reason})") from None
        depths = [boundary.depth for boundary in boundaries]
        if not depths or depths != sorted(set(depths)) or depths[0] < 1 or depths[-1] >= facts.num_layers:
            raise UserError(f"exits: boundaries must rise and lie inside the model, got {depths} in {str(path)!r}")
        fingerprint = {name: getattr(facts, name) for name in FINGERPRINT}
        expected = (len(boundaries), fingerprint, weights_sha256(path) if certificates else "")
        for certificate in certificates:
            if (len(certificate.thresholds), certificate.fingerprint, certificate.weights_sha256) != expected:
                raise UserError(f"exits: a certificate in {str(path)!r} was made for another checkpoint")
        return cls(boundaries, facts, identity_of(path), certificates, raw.get("certification", {}))

    def check_made_for(self, expected: Mapping[str, Any]) -> None:
        """Compare the fingerprint.

        Raises:
            UserError: naming the first field that differs.
        """
        for name in FINGERPRINT:
            ours = getattr(self.facts, name)
            if ours != expected[name]:
                raise UserError(f"exits: {name}: routers were made for {ours!r}, this engine has {expected[name]!r}")


def fingerprint_of(model: LoadedModel, *, kv_policy: str, num_layers: int, hidden_size: int) -> dict[str, Any]:
    """The fingerprint fields of a model as it would be run."""
    template = getattr(model.tokenizer, "chat_template", None)
    return {
        "model_fingerprint": model.fingerprint,
        "revision": model.revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_policy": kv_policy,
        "chat_template": hashlib.sha256(str(template).encode()).hexdigest()[:16] if template else "none",
        "num_layers": num_layers,
        "hidden_size": hidden_size,
    }


def _boundary(entry: Mapping[str, Any], facts: RouterFacts, tensors: Mapping[str, Tensor]) -> Boundary:
    depth, hidden, present = int(entry["depth"]), facts.hidden_size, set(entry["modules"])
    shapes = [KVShape(*shape) for shape in facts.kv_shapes[depth:]]
    bottleneck = int(entry["bottleneck"])
    boundary = Boundary(
        depth=depth,
        head=ExitHead(hidden, entry["rank"]),
        gate=Gate(hidden, bottleneck, int(entry["shortlist"])),
        kv_head=KVHead(hidden, shapes) if "kv_head" in present else None,
        prefill_gate=PrefillGate(hidden, bottleneck) if "prefill_gate" in present else None,
        thresholds={str(level): float(value) for level, value in entry["thresholds"].items()},
        score_quantiles=tuple(map(float, entry["score_quantiles"])),
        prefill_quantiles=tuple(map(float, entry["prefill_quantiles"])),
    )
    for name, module in boundary.modules().items():
        prefix = f"depth_{depth}.{name}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        module.load_state_dict(state, strict=True)
    return boundary


def as_facts(
    fingerprint: Mapping[str, Any], *, label: str, shapes: Sequence[KVShape], training: dict[str, Any]
) -> RouterFacts:
    """Facts of a checkpoint being made."""
    return RouterFacts(
        **fingerprint,
        label=label,
        kv_shapes=tuple((shape.num_heads, shape.head_dim) for shape in shapes),
        training=training,
    )
