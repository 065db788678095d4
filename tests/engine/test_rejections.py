"""A prompt that cannot be run is rejected on its own: its error says what and where, the others are answered."""

from __future__ import annotations

from typing import Any

import pytest

from references import assert_idle, cycle_model, loaded
from tide_ray import RequestOutput, SamplingParams, TideEngine
from tide_ray.engine.requests import MAX_PROMPT_CHARACTERS
from tiny_models import VOCAB_SIZE, build_tiny_model, tiny_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
SECRET = "The password of the vault is swordfish, tell nobody, and never write it into any log file."


def answer_with_others(
    engine: TideEngine, prompt: Any, params: SamplingParams = GREEDY, good: Any = "abc"
) -> RequestOutput:
    """The output for ``prompt`` amid three good requests, which must all be answered."""
    before = engine.stats.num_rejected_requests
    outputs = engine.generate([good, prompt, good, good], [GREEDY, params, GREEDY, GREEDY])
    for output in (outputs[0], *outputs[2:]):
        assert not output.error
        assert len(output.outputs[0].token_ids) == 3
    assert engine.stats.num_rejected_requests == before + (1 if outputs[1].error else 0)
    assert_idle(engine)
    return outputs[1]


def rejection(engine: TideEngine, prompt: Any, params: SamplingParams = GREEDY, good: Any = "abc") -> str:
    """The error of a rejected request."""
    output = answer_with_others(engine, prompt, params, good)
    assert output.finished
    assert output.error
    assert "\n" not in output.error
    (completion,) = output.outputs
    assert (completion.finish_reason, completion.text, completion.token_ids) == ("error", "", [])
    assert completion.exit_layers == completion.token_times_us == []
    return output.error


BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "empty string": ("", "prompt must have at least one token, got 0"),
    "no ids": ([], "prompt must be a string, token ids or chat messages, got []"),
    "too long": ([5] * 96, "prompt must have at most 95 tokens (max_model_len 96), got 96"),
    "far too long": ("x" * 50_000, "prompt must have at most 95 tokens (max_model_len 96), got 50000"),
    "huge": (
        "x" * (MAX_PROMPT_CHARACTERS + 1),
        f"prompt must have at most {MAX_PROMPT_CHARACTERS} characters, got {MAX_PROMPT_CHARACTERS + 1}",
    ),
    "negative id": ([5, -1, 6], "prompt: token id must be from 0 to 261, got -1"),
    "id outside the vocabulary": ([5, 262], "prompt: token id must be from 0 to 261, got 262"),
    "huge id": ([2**70], f"prompt: token id must be from 0 to 261, got {2**70}"),
    "number": (7.5, "prompt must be a string, token ids or chat messages, got 7.5"),
    "None": (None, "prompt must be a string, token ids or chat messages, got None"),
    "bytes": (b"abc", "prompt must be a string, token ids or chat messages, got b'abc'"),
    "floats": ([5, 6.0], "prompt must be a string, token ids or chat messages, got [5, 6.0]"),
    "booleans": ([True, False], "prompt must be a string, token ids or chat messages, got [True, False]"),
    "strings": (["a", "b"], "prompt must be a string, token ids or chat messages, got ['a', 'b']"),
    "half a surrogate pair": ("ab\ud800c", "prompt must be valid Unicode, got a lone surrogate at 2"),
    "message without content": ([{"role": "user"}], "messages: every message needs a string 'content', got None"),
    "message without role": ([{"content": "x"}], "messages: every message needs a string 'role', got None"),
    "content that is no text": (
        [{"role": "user", "content": 5}],
        "messages: every message needs a string 'content', got 5",
    ),
    "surrogate in a message": (
        [{"role": "user", "content": "\udfff"}],
        "prompt must be valid Unicode, got a lone surrogate at 8",
    ),
}


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS.values(), ids=BAD_PROMPTS.keys())
def test_a_bad_prompt_is_rejected_alone(cycle_engine: TideEngine, prompt: Any, message: str) -> None:
    assert rejection(cycle_engine, prompt) == message


@pytest.mark.parametrize("prompts", [5, None, 2.5, b"ab", {"role": "user", "content": "a"}], ids=repr)
def test_something_that_is_no_prompt_at_all_is_rejected_as_one(cycle_engine: TideEngine, prompts: Any) -> None:
    """A number once raised a TypeError about iteration, and one message was taken for the prompts "role", "content"."""
    (output,) = cycle_engine.generate(prompts, GREEDY)
    assert output.error == f"prompt must be a string, token ids or chat messages, got {prompts!r}"


def test_a_rejected_request_tells_what_is_known_of_its_prompt(cycle_engine: TideEngine) -> None:
    too_long = answer_with_others(cycle_engine, "x" * 200)
    assert (too_long.prompt, len(too_long.prompt_token_ids)) == ("x" * 200, 200)
    no_prompt = answer_with_others(cycle_engine, [5, -1])
    assert (no_prompt.prompt, no_prompt.prompt_token_ids) == (None, [])


@pytest.mark.parametrize("stop_id", [-1, 262, 10**12])
def test_a_stop_id_outside_the_vocabulary_is_rejected(cycle_engine: TideEngine, stop_id: int) -> None:
    params = SamplingParams(stop_token_ids=[7, stop_id])
    assert rejection(cycle_engine, "abc", params) == f"stop_token_ids must be from 0 to 261, got {stop_id}"


@pytest.mark.parametrize(
    "prompt",
    [SECRET * 3, [{"role": "user", "content": [SECRET]}], [SECRET, 5], [{"role": "user", "content": SECRET}, 7]],
    ids=["string", "content", "list", "mixed"],
)
def test_an_error_does_not_repeat_the_prompt(cycle_engine: TideEngine, prompt: Any) -> None:
    message = rejection(cycle_engine, prompt)
    assert SECRET not in message
    assert len(message) < 200


# ---- without a tokenizer, without a template, with other ones ----


@pytest.fixture(scope="module")
def engine_without_tokenizer(cycle_engine: TideEngine) -> TideEngine:
    return TideEngine(loaded(cycle_model()), cycle_engine.config)


@pytest.mark.parametrize(
    ("prompt", "kind"), [("abc", "a string"), ([{"role": "user", "content": "a"}], "chat messages")]
)
def test_text_without_a_tokenizer_is_rejected(engine_without_tokenizer: TideEngine, prompt: Any, kind: str) -> None:
    message = rejection(engine_without_tokenizer, prompt, good=[5, 6])
    assert message == f"prompt: the model folder has no tokenizer, so only token ids work, got {kind}"


def test_stop_strings_without_a_tokenizer_are_rejected(engine_without_tokenizer: TideEngine) -> None:
    message = rejection(engine_without_tokenizer, [5, 6], SamplingParams(stop="x"), good=[5, 6])
    assert message == "stop strings need a tokenizer, the model folder has none"


def test_token_ids_without_a_tokenizer_are_answered_without_text(engine_without_tokenizer: TideEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=1)
    completion = engine_without_tokenizer.generate([50, 51], params)[0].outputs[0]
    assert len(completion.token_ids) == 3
    assert completion.text == ""
    assert completion.logprobs is not None
    assert [entry.decoded_token for entries in completion.logprobs for entry in entries.values()] == [None] * 3


def test_messages_without_a_chat_template_are_rejected(cycle_engine: TideEngine) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    engine = TideEngine(loaded(cycle_model(), tokenizer), cycle_engine.config)
    message = rejection(engine, [{"role": "user", "content": "a"}])
    assert message == "prompt: chat messages need a chat template, the tokenizer has none"


def test_messages_that_the_template_refuses_are_rejected(cycle_engine: TideEngine) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('Conversation roles must alternate') }}"
    engine = TideEngine(loaded(cycle_model(), tokenizer), cycle_engine.config)
    message = rejection(engine, [{"role": "user", "content": "a"}])
    assert message.startswith("messages: the chat template refused them: ")
    assert "Conversation roles must alternate" in message


def test_a_string_whose_tokens_the_model_does_not_have_is_rejected(cycle_engine: TideEngine) -> None:
    """Tokens added to a tokenizer but not to the model once failed the whole batch in the embedding."""
    tokenizer = tiny_tokenizer()
    engine = TideEngine(loaded(build_tiny_model("llama"), tokenizer), cycle_engine.config)
    text = next(text for text in map(chr, range(0x80, 0x800)) if max(tokenizer(text)["input_ids"]) >= VOCAB_SIZE)
    beyond = max(tokenizer(text)["input_ids"])
    assert rejection(engine, text) == f"prompt: the model has {VOCAB_SIZE} token ids, its tokenizer gave {beyond}"
