"""Tokens that were chosen on a device, and their log probabilities, on their way to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tide_ray.engine.transfers import Download, upload_one
from tide_ray.types import Logprob


@dataclass(slots=True)
class SampledTokens:
    """One token per row, and its log probabilities where they were asked for."""

    token_ids: list[int]
    logprobs: list[dict[int, Logprob] | None]


class Choice:
    """One token per row, still to be read.

    Args:
        tokens: long ``[R]``.
        logits: ``[R, V]``, unprocessed.
        num_logprobs: for each row how many log probabilities beside the chosen token's are wanted, None for none.
    """

    def __init__(self, tokens: torch.Tensor, logits: torch.Tensor, num_logprobs: Sequence[int | None]) -> None:
        self.tokens = tokens
        self._token_ids = Download(tokens)
        self._asked = [(r, number) for r, number in enumerate(num_logprobs) if number is not None]
        self._columns = [Download(column) for column in self._log_probabilities(logits)] if self._asked else []

    def read(self) -> SampledTokens:
        """Wait for the tokens, and for nothing that was queued after them."""
        token_ids: list[int] = self._token_ids.read().tolist()
        logprobs: list[dict[int, Logprob] | None] = [None] * len(token_ids)
        columns = zip(self._asked, *(column.read().tolist() for column in self._columns), strict=False)
        for (r, num_top), logprob, rank, values, ids in columns:
            entry = {token_ids[r]: Logprob(logprob, rank)}
            for value, top_id in zip(values[:num_top], ids[:num_top], strict=True):
                entry.setdefault(top_id, Logprob(value, values.index(value) + 1))
            logprobs[r] = entry
        return SampledTokens(token_ids, logprobs)

    def _log_probabilities(self, logits: torch.Tensor) -> list[torch.Tensor]:
        """Of the rows that ask: the chosen token's and its rank, then the likeliest ones and their ids."""
        index = upload_one(np.array([r for r, _ in self._asked]), logits.device)
        logprobs = logits.index_select(0, index).float().log_softmax(dim=-1)
        chosen = logprobs.gather(1, self.tokens[index][:, None])
        ranks = (logprobs > chosen).sum(dim=-1) + 1
        top = logprobs.topk(min(max(number for _, number in self._asked), logits.shape[1]), dim=-1)
        return [chosen[:, 0], ranks, top.values, top.indices]
