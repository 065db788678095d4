"""Trains gates, calibrates their scores on prompts they have not seen, and measures them on others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tide_ray.exits.gates import Gate

AnyGate = TypeVar("AnyGate", bound=Gate)

EPOCHS = 20
MIN_STEPS = 800
PATIENCE = 8
BATCH = 256
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
DROPPED_BYTES = 26
"""Of 256: a tenth of the inputs are dropped."""
HELD_OUT = 0.15
BINS = 10


def train_gate(
    states: Tensor,
    targets: Tensor,
    sequences: Tensor,
    *,
    make: Callable[[], AnyGate],
    seed: int,
    is_balanced: bool,
    features: Tensor | None = None,
) -> AnyGate:
    """A gate whose logit predicts ``targets`` (labels, or soft ones from 0 to 1).

    The weights of the epoch that is best on held-out sequences are kept.

    Args:
        states: unit-rms ``[N, D]``.
        targets: float ``[N]``.
        sequences: which sequence each row is from, ``[N]``.
        make: makes the gate, with room for the features.
        is_balanced: weigh both classes alike.
        features: scalars beside the states, ``[N, F]``.
    """
    states, targets = states.float(), targets.float()
    generator = torch.Generator().manual_seed(seed)
    ids = sequences.unique()
    chosen = ids[torch.randperm(len(ids), generator=generator)[: max(1, round(HELD_OUT * len(ids)))]]
    is_held_out = torch.isin(sequences, chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = make()
        rows = (states, torch.zeros(len(states), 0) if features is None else features, targets)
        train, held = (tuple(part[chosen] for part in rows) for chosen in (~is_held_out, is_held_out))
        share = targets[~is_held_out].mean().clamp(0.01, 0.99)
        weights = (0.5 / share, 0.5 / (1 - share)) if is_balanced else (torch.tensor(1.0), torch.tensor(1.0))
        return _fit(gate, train, held, weights, generator)


def _fit(
    gate: AnyGate,
    train: tuple[Tensor, ...],
    held: tuple[Tensor, ...],
    weights: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> AnyGate:
    optimizer = torch.optim.AdamW(gate.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    """``train`` and ``held`` are states, features (of width 0 without any) and targets."""
    states, features, targets = train
    steps_per_epoch = -(-len(states) // BATCH)
    num_epochs = max(EPOCHS, -(-MIN_STEPS // steps_per_epoch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_epochs * steps_per_epoch)
    rng = np.random.default_rng(generator.initial_seed())
    best, best_loss, epochs_since = copy.deepcopy(gate.state_dict()), float("inf"), 0
    for _ in range(num_epochs):
        gate.train()
        for index in torch.randperm(len(states), generator=generator).split(BATCH):
            batch = _dropped(states[index], rng)
            loss = _loss(gate.logits(batch, features[index]), targets[index], weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        gate.eval()
        with torch.no_grad():
            held_loss = float(_loss(gate.logits(held[0], held[1]), held[2], weights))
        if held_loss < best_loss:
            best, best_loss, epochs_since = copy.deepcopy(gate.state_dict()), held_loss, 0
        else:
            epochs_since += 1
            if epochs_since == PATIENCE:
                break
    gate.load_state_dict(best)
    return gate.eval().requires_grad_(False)


def _dropped(states: Tensor, rng: np.random.Generator) -> Tensor:
    """Dropout from random bytes: torch's own draws a number for each input, which took longer than the gate itself."""
    kept = torch.from_numpy(rng.integers(0, 256, states.shape, dtype=np.uint8) >= DROPPED_BYTES)
    return states * kept * (256 / (256 - DROPPED_BYTES))


def _loss(logits: Tensor, targets: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    each = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (each * torch.where(targets > 0.5, weights[0], weights[1])).mean()


def calibrate_scores(gate: Gate, raw: Tensor, labels: Tensor) -> None:
    """Platt's calibration: set scale and offset so that scores are probabilities on rows whose logits are ``raw``."""
    scale, offset = torch.ones((), requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([scale, offset], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(raw * scale + offset, labels.float())
        loss.backward()
        return loss

    optimizer.step(closure)
    if float(scale.detach()) > 0:  # else the gate ranks backwards on these rows, and is better left alone
        gate.scale.copy_(scale.detach())
        gate.offset.copy_(offset.detach())


def threshold_at(scores: np.ndarray, labels: np.ndarray, error: float) -> float:
    """The lowest score from which at most ``error`` of the rows are wrong; 2.0 (never) when there is none."""
    order = np.argsort(-scores, kind="stable")
    wrong = np.cumsum(~labels[order])
    counts = np.arange(1, len(order) + 1)
    # Rows of one score exit together, so a cut is only possible where the score changes.
    is_cut = np.append(scores[order][1:] != scores[order][:-1], True)
    fine = np.flatnonzero((wrong <= error * counts) & is_cut)
    return float(scores[order][fine[-1]]) if len(fine) else 2.0


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve (ties count half), NaN when only one class is there."""
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def reliability(scores: np.ndarray, labels: np.ndarray) -> list[tuple[float, float, int]]:
    """Mean score, share of true labels and number of rows of each of ten bins of equal width, but for empty ones."""
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    members = [bins == b for b in range(BINS)]
    return [(float(scores[m].mean()), float(labels[m].mean()), int(m.sum())) for m in members if m.any()]


def calibration_error(scores: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error over ten bins of equal width (Guo et al., arXiv 1706.04599)."""
    return sum(abs(score - share) * count for score, share, count in reliability(scores, labels)) / len(scores)


def precision_at(scores: np.ndarray, labels: np.ndarray, shares: Sequence[float]) -> list[float]:
    """Share of true labels among the rows of the highest scores, for each share of rows that is taken."""
    right = np.cumsum(labels[np.argsort(-scores, kind="stable")])
    counts = [max(1, round(share * len(scores))) for share in shares]
    return [float(right[count - 1] / count) for count in counts]
