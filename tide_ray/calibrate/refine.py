"""Refines an exit head by the KL divergence from the full-depth distribution (as tuned lenses, arXiv 2303.08112).

The divergence is over the tokens that full depth puts among its likeliest on the job's own data, which makes it an
order of magnitude cheaper than over the vocabulary.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from tide_ray.exits.readouts import ExitHead
from tide_ray.models.adapter import Adapter

EPOCHS = 4
BATCH = 512
LEARNING_RATE = 2e-4
NUM_TOKENS = 4096
LIKELIEST = 8
CHUNK = 1024


class RestrictedReadout:
    """The model's final norm and LM head, restricted to the tokens that matter on given states; differentiable.

    Raises:
        ValueError: the head is not linear (a soft-cap), so no restricted matrix stands for it.
    """

    def __init__(self, adapter: Adapter, final_states: Tensor) -> None:
        self._adapter = adapter
        counts = torch.zeros(adapter.config.vocab_size, dtype=torch.long)
        with torch.no_grad():
            for chunk in final_states.split(CHUNK):
                logits = adapter.head(adapter.final_norm(chunk[None]))
                counts += torch.bincount(logits.topk(LIKELIEST, dim=-1).indices.flatten().cpu(), minlength=len(counts))
            self.token_ids = counts.topk(min(NUM_TOKENS, int((counts > 0).sum()))).indices
            self._matrix, self._bias = self._linear_head()
            self._working = self._matrix.to(adapter.dtype)

    def _linear_head(self) -> tuple[Tensor, Tensor]:
        adapter = self._adapter
        width, dtype, device = adapter.config.hidden_size, adapter.dtype, adapter.device
        ids = self.token_ids.to(device)
        bias = adapter.head(torch.zeros(1, 1, width, dtype=dtype, device=device))[0, ids].float()
        columns = []
        for start in range(0, width, CHUNK):
            basis = torch.eye(width, dtype=dtype, device=device)[start : start + CHUNK]
            columns.append(adapter.head(basis[None])[:, ids].float() - bias)
        matrix = torch.cat(columns)  # [D, tokens]
        probe = torch.randn(1, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        direct = adapter.head(probe[None] * 8)[0, ids].float()
        if not torch.allclose(
            (probe.float() * 8 @ matrix)[0] + bias, direct, rtol=0.05, atol=0.05 * float(direct.std())
        ):
            raise ValueError("the LM head is not linear")
        return matrix.clone(), bias.clone()

    def shortlist(self, num_tokens: int) -> Tensor:
        """Rows of the LM head for the most frequent of the tokens, float32 ``[num_tokens, D]``."""
        return self._matrix[:, :num_tokens].T.contiguous()

    def __call__(self, states: Tensor) -> Tensor:
        """Pre-norm states ``[N, D]`` -> float32 logits ``[N, tokens]``, multiplied in the model's dtype."""
        normed = self._adapter.final_norm(states[None])[0]
        return (normed @ self._working).float() + self._bias


def refine_head(head: ExitHead, states: Tensor, final_states: Tensor, readout: RestrictedReadout, *, seed: int) -> None:
    """Train ``head`` in place from where it is.

    Args:
        states: unit-rms boundary states ``[N, D]``.
        final_states: the pre-norm states after the last layer, ``[N, D]``.
    """
    generator = torch.Generator().manual_seed(seed)
    head.float().requires_grad_(True)
    optimizer = torch.optim.Adam(head.parameters(), lr=LEARNING_RATE)
    num_steps = -(-len(states) // BATCH) * EPOCHS
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=max(num_steps, 2))
    with torch.no_grad():
        targets = torch.cat([readout(part).log_softmax(-1).to(part.dtype) for part in final_states.split(CHUNK)])
    for _ in range(EPOCHS):
        for index in torch.randperm(len(states), generator=generator).split(BATCH):
            target = targets[index].float()
            predicted = readout(head(states[index].float()).to(final_states.dtype)).log_softmax(-1)
            loss = torch.nn.functional.kl_div(predicted, target, log_target=True, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    head.requires_grad_(False)


def refined(head: ExitHead, states: Tensor, final_states: Tensor, readout: RestrictedReadout, *, seed: int) -> ExitHead:
    """A refined copy of ``head``."""
    copied = copy.deepcopy(head)
    refine_head(copied, states, final_states, readout, seed=seed)
    return copied
