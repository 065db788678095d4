"""A step that was queued: whose tokens it chooses is known at once, the tokens once they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from tide_ray.engine.choice import Choice
from tide_ray.engine.lanes import Lane
from tide_ray.engine.sequence import Proposal, Sequence
from tide_ray.types import Logprob


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token chosen for one sequence, the depth its state left the layers at, and the last gate's score.

    ``proposal``: of a draft that is accepted by ratio, the probability it was drawn with and the state it is from.
    """

    sequence: Sequence
    token_id: int
    depth: int
    logprobs: dict[int, Logprob] | None
    score: float = math.nan
    proposal: Proposal | None = None


class Launch:
    """Tokens that a step chooses: one for a sequence, or one at each of its drafts and one after them.

    Args:
        lanes: one for each token.
        depths: at which each token's state left the layers.
        choice: the tokens, None where there are no lanes.
        proposals: by the token's place.
    """

    def __init__(
        self,
        lanes: Seq[Lane],
        depths: Seq[int],
        choice: Choice | None,
        proposals: Mapping[int, Proposal] | None = None,
    ) -> None:
        assert (choice is None) == (not lanes)
        self._places = {lane.sequence: place for place, lane in enumerate(lanes)}
        self.sequences = list(self._places)
        self._lanes = lanes
        self._depths = depths
        self._choice = choice
        self._proposals = proposals or {}

    @property
    def may_be_read_later(self) -> bool:
        """Whether the next step can be queued before these tokens are known: all that it needs of them are their ids,
        which it finds on the device."""
        return all(sequence.params.repetition_penalty == 1.0 for sequence in self.sequences)

    @property
    def tokens(self) -> torch.Tensor:
        """Long ``[n]``, on the device, see ``place``."""
        assert self._choice is not None, "no token is chosen"
        return self._choice.tokens

    def place(self, sequence: Sequence) -> int:
        """Where the token of a sequence is in ``tokens``."""
        return self._places[sequence]

    def read(self) -> list[SampledToken]:
        """Wait for the tokens."""
        if self._choice is None:
            return []
        sampled = self._choice.read()
        return [
            SampledToken(lane.sequence, token_id, depth, logprobs, lane.score, self._proposals.get(place))
            for place, (lane, depth, token_id, logprobs) in enumerate(
                zip(self._lanes, self._depths, sampled.token_ids, sampled.logprobs, strict=True)
            )
        ]
