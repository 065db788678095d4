"""Admission: what was asked for is checked and becomes sequences that can be scheduled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import cast

from tide_ray.config import EngineConfig
from tide_ray.engine.exit_setup import exit_rules
from tide_ray.engine.requests import Request, make_detokenizer
from tide_ray.engine.sequence import Sequence, now_us
from tide_ray.exits.checkpoint import Routers
from tide_ray.models.loading import LoadedModel
from tide_ray.types import Prompt, SamplingParams, UserError


class RequestMaker:
    """Makes an engine's requests.

    Args:
        max_model_len: tokens that prompt and answer may have together.
        num_kv_tokens: tokens that all K/V pages hold.
        vocab_size: token ids that the model has.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        routers: Routers | None,
        *,
        max_model_len: int,
        num_kv_tokens: int,
        vocab_size: int,
    ) -> None:
        self._model = model
        self._config = config
        self._routers = routers
        self._max_model_len = max_model_len
        self._max_prompt_tokens = min(max_model_len, num_kv_tokens) - 1
        self._vocab_size = vocab_size
        self._num_seeds = 0  # given to completions of requests that bring none

    def make(
        self, request_id: str, text: str | None, prompt_ids: list[int], params: SamplingParams, *, streaming: bool
    ) -> Request:
        """A request of ``params.n`` sequences.

        Raises:
            UserError: the prompt is empty or too long, or the parameters ask for what this engine does not have.
        """
        self._check_length(prompt_ids)
        for token_id in params.stop_token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise UserError(f"stop_token_ids must be from 0 to {self._vocab_size - 1}, got {token_id}")
        arrival = now_us()
        eos = () if params.ignore_eos else self._model.eos_token_ids
        rules = exit_rules(self._config, self._routers, params)
        seed = params.seed if params.seed is not None else self._next_seeds(params.n)
        sequences = [
            Sequence(
                request_id=request_id,
                index=index,
                prompt_ids=prompt_ids,
                params=params,
                seed=seed + index,
                stop_ids=frozenset((*eos, *params.stop_token_ids)),
                max_tokens=params.most_tokens(self._max_model_len - len(prompt_ids)),
                arrival_us=arrival,
                exit_rules=rules,
                detokenizer=make_detokenizer(self._model.tokenizer, params, streaming=streaming),
            )
            for index in range(params.n)
        ]
        return Request(request_id, text, prompt_ids, params, arrival, sequences)

    def _check_length(self, prompt_ids: list[int]) -> None:
        if not prompt_ids:
            raise UserError("prompt must have at least one token, got 0")
        if len(prompt_ids) > self._max_prompt_tokens:
            raise UserError(
                f"prompt must have at most {self._max_prompt_tokens} tokens (max_model_len {self._max_model_len}), "
                f"got {len(prompt_ids)}"
            )

    def _next_seeds(self, count: int) -> int:
        """The first of ``count`` seeds in a row for a request that brings none: no other request gets any of them, and
        they repeat with the engine's own seed."""
        first = (self._config.seed << 32) + self._num_seeds
        self._num_seeds += count
        return first


def as_list(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """One prompt or many: a string, a list of ids and a list of chat messages are each one prompt."""
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        return [cast(Prompt, prompts)]
    items = list(prompts)
    if items and all(isinstance(item, (int, Mapping)) for item in items):
        return [cast(Prompt, items)]
    return cast(list[Prompt], items)


def params_for_each(given: SamplingParams | Seq[SamplingParams] | None, num_prompts: int) -> list[SamplingParams]:
    """One for each prompt.

    Raises:
        UserError: they are not SamplingParams, or not as many as the prompts.
    """
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * num_prompts
    if not isinstance(given, Seq) or not all(isinstance(one, SamplingParams) for one in given):
        raise UserError(f"sampling_params must be SamplingParams or a list of them, got {type(given).__name__}")
    if len(given) != num_prompts:
        raise UserError(f"sampling_params must be one or one for each of {num_prompts} prompts, got {len(given)}")
    return list(given)
