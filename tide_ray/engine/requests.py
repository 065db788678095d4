"""From a prompt to sequences, and from sequences back to a RequestOutput."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tide_ray.engine.detokenizer import Detokenizer
from tide_ray.engine.sequence import Sequence, now_us
from tide_ray.types import CompletionOutput, Logprob, Prompt, RequestOutput, SamplingParams, UserError, is_integer

MAX_PROMPT_CHARACTERS = 10_000_000


@dataclass(slots=True, eq=False)
class Request:
    """One prompt being answered by ``params.n`` sequences."""

    request_id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    arrival_us: int
    sequences: list[Sequence]
    error: str = ""

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)


class PromptEncoder:
    """Turns prompts into token ids; every problem is a UserError that names the prompt's fault."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size

    def encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """The prompt's text (None for token ids) and its token ids."""
        if isinstance(prompt, str):
            self._need_tokenizer("a string")
            self._check_size(prompt)
            return prompt, self._tokenize(prompt, add_special_tokens=True)
        if not isinstance(prompt, (list, tuple)) or not prompt:
            raise UserError(f"prompt must be a string, token ids or chat messages, got {_short(prompt)}")
        if all(isinstance(item, Mapping) for item in prompt):
            text = self.render_chat([dict(message) for message in prompt if isinstance(message, Mapping)])
            return text, self._tokenize(text, add_special_tokens=False)
        ids = []
        for item in prompt:
            if not is_integer(item):
                raise UserError(f"prompt must be a string, token ids or chat messages, got {_short(prompt)}")
            if not 0 <= item < self.vocab_size:
                raise UserError(f"prompt: token id must be from 0 to {self.vocab_size - 1}, got {item}")
            ids.append(item)
        return None, ids

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """Chat messages as text, by the tokenizer's template, ready for the answer."""
        self._need_tokenizer("chat messages")
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError("prompt: chat messages need a chat template, the tokenizer has none")
        for message in messages:
            for name in ("role", "content"):
                if not isinstance(message.get(name), str):
                    raise UserError(f"messages: every message needs a string {name!r}, got {_short(message.get(name))}")
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates are programs that come with the model and raise what they like
            raise UserError(f"messages: the chat template refused them: {_short(str(error))}") from error
        self._check_size(text)
        return text

    def _tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON may spell half of a surrogate pair; tokenizers raise TypeError
            raise UserError(f"prompt must be valid Unicode, got a lone surrogate at {error.start}") from None
        ids = list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        if ids and max(ids) >= self.vocab_size:  # tokens were added to the tokenizer but not to the model
            raise UserError(f"prompt: the model has {self.vocab_size} token ids, its tokenizer gave {max(ids)}")
        return ids

    def _need_tokenizer(self, kind: str) -> None:
        if self.tokenizer is None:
            raise UserError(f"prompt: the model folder has no tokenizer, so only token ids work, got {kind}")

    def _check_size(self, text: str) -> None:
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise UserError(f"prompt must have at most {MAX_PROMPT_CHARACTERS} characters, got {len(text)}")


def _short(value: object) -> str:
    """A value for an error message: one line, bounded, so that prompts do not end up in logs."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."


def rejected(request_id: str, prompt: str | None, prompt_ids: list[int], error: str) -> RequestOutput:
    """The output of a request that could not be run."""
    completion = CompletionOutput(0, "", [], [], [], finish_reason="error")
    return RequestOutput(request_id, prompt, prompt_ids, [completion], error=error)


def completion_text(sequence: Sequence, tokenizer: Any) -> str:
    """The answer's text: without special tokens, the stop token or the stop string."""
    if sequence.detokenizer is not None:
        return sequence.detokenizer.text if sequence.is_finished else sequence.detokenizer.stable_text
    if tokenizer is None:
        return ""
    ended_by_token = sequence.finish_reason == "stop" and not isinstance(sequence.stop_reason, str)
    ids = sequence.output_ids[:-1] if ended_by_token else sequence.output_ids
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def to_output(request: Request, tokenizer: Any, *, finished: bool = True) -> RequestOutput:
    """The request as users see it, finished or as far as it is."""
    outputs = []
    for sequence in request.sequences:
        logprobs = None if request.params.logprobs is None else with_text(sequence.logprobs, tokenizer)
        outputs.append(
            CompletionOutput(
                index=sequence.index,
                text=completion_text(sequence, tokenizer),
                token_ids=list(sequence.output_ids),
                exit_layers=list(sequence.exit_layers),
                token_times_us=list(sequence.token_times_us),
                finish_reason=sequence.finish_reason,
                stop_reason=sequence.stop_reason,
                logprobs=logprobs,
                gate_scores=list(sequence.gate_scores),
                num_accepted_drafts=sequence.num_accepted_drafts,
                num_rejected_drafts=sequence.num_rejected_drafts,
            )
        )
    return request_output(request, outputs, finished=finished)


def request_output(request: Request, outputs: list[CompletionOutput], *, finished: bool) -> RequestOutput:
    """``outputs`` with what is known of the request as a whole."""
    admitted = min((s.admitted_us for s in request.sequences if s.admitted_us), default=request.arrival_us)
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_ids,
        outputs=outputs,
        finished=finished,
        queue_time_us=admitted - request.arrival_us,
        total_time_us=now_us() - request.arrival_us,
        num_cached_tokens=request.sequences[0].num_cached_tokens,
        unix_time_us=time.time_ns() // 1000,
    )


def with_text(logprobs: list[dict[int, Logprob]], tokenizer: Any) -> list[dict[int, Logprob]]:
    """The same log probabilities with the text of each token."""
    if tokenizer is None:
        return list(logprobs)
    return [
        {token: Logprob(entry.logprob, entry.rank, tokenizer.decode([token])) for token, entry in entries.items()}
        for entries in logprobs
    ]


def make_detokenizer(tokenizer: Any, params: SamplingParams, *, streaming: bool) -> Detokenizer | None:
    """An incremental detokenizer where one is needed; otherwise the text is decoded once, at the end."""
    if tokenizer is None:
        if params.stop:
            raise UserError("stop strings need a tokenizer, the model folder has none")
        return None
    return Detokenizer(tokenizer, params) if params.stop or streaming else None
