"""Gates: small networks on a boundary's state that say how likely an exit there is right, without the LM head.

RMS-normalised state -> down-projection -> SiLU -> one score, as the routers of TIDE (arXiv 2603.21365), but trained on
whether the exit head's choice equals full depth's. Beside the state a gate may see how sure the exit head is over a
shortlist of tokens, which costs a small part of the LM head and ranks nearly as well as the whole of it. The same
network, trained on what approximate K/V of a prompt token cost later tokens, decides prefill exits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tide_kernels.route import GateWeights, route

BOTTLENECK = 128
NUM_FEATURES = 3
NUM_PLACES = 2


class Gate(nn.Module):
    """Unit-rms states ``[..., D]`` -> one logit each, ``[...]``; its sigmoid is the calibrated score.

    Runs in float32 whatever the model's dtype is (but for the shortlist's product), so that serving scores as
    calibration did. ``scale`` and ``offset`` are Platt's calibration, fitted on prompts that the weights have not seen.

    Args:
        num_tokens: length of the shortlist: rows of the LM head that are read; 0 for none.
        num_features: scalars beside the state; by default those of the shortlist.
    """

    def __init__(
        self, hidden_size: int, bottleneck: int = BOTTLENECK, num_tokens: int = 0, num_features: int | None = None
    ) -> None:
        super().__init__()
        if num_features is None:
            num_features = NUM_FEATURES if num_tokens else 0
        self.down = nn.Linear(hidden_size, bottleneck)
        self.up = nn.Linear(bottleneck + num_features, 1)
        self.shortlist: nn.Module | None = nn.Linear(hidden_size, num_tokens, bias=False) if num_tokens else None
        self.num_tokens = num_tokens
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("offset", torch.zeros(()))
        self.scale: Tensor
        self.offset: Tensor
        self.kernel_weights: GateWeights | None = None  # for one launch on a GPU, see ``use_kernel``

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
        """Logits from states and their ``features``, None for a gate without any."""
        hidden = nn.functional.silu(self.down(states.float()))
        if features is not None:
            hidden = torch.cat((hidden, features), dim=-1)
        raw: Tensor = self.up(hidden)[..., 0]
        return raw * self.scale + self.offset

    def forward(self, states: Tensor, normed: Tensor | None = None) -> Tensor:
        """``normed`` is needed with a shortlist, see ``features``."""
        return self.logits(states, None if self.shortlist is None or normed is None else self.features(normed))

    def scores(self, states: Tensor, normed: Tensor | None = None) -> Tensor:
        """Probability in float32 that stopping here is right."""
        return self._probabilities(states, None if self.shortlist is None or normed is None else self.features(normed))

    def use_kernel(self) -> None:
        """Score in one launch from now on, with the weights as they are."""
        with torch.no_grad():
            self.kernel_weights = GateWeights(
                down=self.down.weight.T.contiguous(),
                down_bias=self.down.bias.detach(),
                up=self.up.weight[0].detach(),
                calibration=torch.stack((self.up.bias[0], self.scale, self.offset)),
            )

    def _probabilities(self, states: Tensor, features: Tensor | None) -> Tensor:
        if self.kernel_weights is not None:
            return route(states, self.kernel_weights, None, features=features)[0]
        return torch.sigmoid(self.logits(states, features))


class PrefillGate(Gate):
    """Predicts from state and place what later tokens lose when a prompt token stops: ``damage`` x as x / (1 + x).

    Damage is the relative error of the token's fitted K/V, layer by layer weighted with the attention that the answer
    pays to it; where a prompt token stands says much of the latter. Its unit is common to all boundaries of a model.
    """

    def __init__(self, hidden_size: int, bottleneck: int = BOTTLENECK) -> None:
        super().__init__(hidden_size, bottleneck, num_features=NUM_PLACES)

    def start_from(self, features: Tensor, damages: Tensor) -> PrefillGate:
        """Begin at the least-squares fit of log damage by ``places`` alone: far from there, and cheap to find."""
        inputs = torch.cat((features, torch.ones(len(features), 1)), dim=1)
        weights = torch.linalg.lstsq(inputs, damages.clamp_min(1e-6).log()[:, None]).solution[:, 0]
        with torch.no_grad():
            self.up.weight[0, -NUM_PLACES:] = weights[:-1]
            self.up.bias.fill_(weights[-1])
        return self

    def damages(self, states: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
        """Predictions in float32 from 0 to 1, ``[N]``, for unit-rms states of prompt tokens at ``positions`` of prompts
        of ``lengths`` tokens (long ``[N]`` each)."""
        return self._probabilities(states, places(positions, lengths))


def places(positions: Tensor, lengths: Tensor) -> Tensor:
    """Where prompt tokens stand, ``[N, 2]``: log of the distance to the prompt's end, and the share before."""
    distances = (lengths - positions).clamp_min(1).float()
    return torch.stack((distances.log(), positions / lengths.clamp_min(1)), dim=-1)
