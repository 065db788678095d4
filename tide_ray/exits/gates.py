"""Gates: small networks on a boundary's state that say how likely an exit there is right, without the LM head.

RMS-normalised state -> down-projection -> SiLU -> one score, as the routers of TIDE (arXiv 2603.21365), but trained on
whether the exit head's choice equals full depth's. Beside the state a gate may see how sure the exit head is over a
shortlist of tokens, which costs a small part of the LM head and ranks nearly as well as the whole of it. The same
network, trained on K/V error, decides prefill exits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BOTTLENECK = 128
NUM_FEATURES = 3


class Gate(nn.Module):
    """Unit-rms states ``[..., D]`` -> one logit each, ``[...]``; its sigmoid is the calibrated score.

    Runs in float32 whatever the model's dtype is (but for the shortlist's product), so that serving scores as
    calibration did. ``scale`` and ``offset`` are Platt's calibration, fitted on prompts that the weights have not seen.

    Args:
        num_tokens: length of the shortlist: rows of the LM head that are read; 0 for none.
    """

    def __init__(self, hidden_size: int, bottleneck: int = BOTTLENECK, num_tokens: int = 0) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, bottleneck)
        self.up = nn.Linear(bottleneck + (NUM_FEATURES if num_tokens else 0), 1)
        self.shortlist: nn.Module | None = nn.Linear(hidden_size, num_tokens, bias=False) if num_tokens else None
        self.num_tokens = num_tokens
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("offset", torch.zeros(()))
        self.scale: Tensor
        self.offset: Tensor

    def features(self, normed: Tensor) -> Tensor:
        """How sure the exit head is: ``normed`` (its output after the final norm, ``[N, D]``) -> ``[N, 3]``.

        Log probability of the first token of the shortlist, its lead over the second, and its log odds.
        """
        assert self.shortlist is not None
        logits: Tensor = self.shortlist(normed).float()
        top = logits.topk(2, dim=-1).values
        log_first = top[:, 0] - logits.logsumexp(-1)
        log_odds = log_first - torch.log(-torch.expm1(log_first.clamp_max(-1e-6)))
        return torch.stack((log_first, top[:, 0] - top[:, 1], log_odds), dim=-1)

    def logits(self, states: Tensor, features: Tensor | None) -> Tensor:
        """Logits from states and, with a shortlist, their ``features``."""
        hidden = nn.functional.silu(self.down(states.float()))
        if features is not None:
            hidden = torch.cat((hidden, features), dim=-1)
        raw: Tensor = self.up(hidden)[..., 0]
        return raw * self.scale + self.offset

    def forward(self, states: Tensor, normed: Tensor | None = None) -> Tensor:
        """``normed`` is needed with a shortlist, see ``features``."""
        return self.logits(states, None if self.shortlist is None or normed is None else self.features(normed))

    def scores(self, states: Tensor, normed: Tensor | None = None) -> Tensor:
        """Probability in float32 that stopping here is right (for a prefill gate: predicted relative K/V error)."""
        return torch.sigmoid(self(states, normed))
