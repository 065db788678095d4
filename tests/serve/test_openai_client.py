"""The official client against the application: whole and streamed answers, every sampling field, error classes."""

from __future__ import annotations

import asyncio
import dataclasses

import openai
import pytest

from serving import EXITING, MODEL, Running
from tide_ray import SamplingParams, TideEngine

GREEDY = {"model": MODEL, "temperature": 0}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]


@pytest.fixture(scope="module")
def offline(live: Running) -> TideEngine:
    """An engine of its own with the served model's settings."""
    engine = live.model.engine.engine
    return TideEngine.from_pretrained(engine.model.source, engine.config)


def expected(offline: TideEngine, prompt: object, **params: object) -> list[object]:
    return offline.generate([prompt], SamplingParams(**{"temperature": 0, **params}))[0].outputs


def test_a_greedy_completion_equals_the_offline_engines(client: openai.OpenAI, offline: TideEngine) -> None:
    answer = client.completions.create(prompt="Once upon", max_tokens=20, **GREEDY)
    [ours] = expected(offline, "Once upon", max_tokens=20)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (ours.text, ours.finish_reason)
    assert answer.choices[0].tide["exit_layers"] == ours.exit_layers
    assert answer.choices[0].tide["mean_exit_layer"] == ours.mean_exit_layer == 4
    assert answer.usage.completion_tokens == len(ours.token_ids)
    assert answer.usage.prompt_tokens == len("Once upon")
    assert (answer.object, answer.model) == ("text_completion", MODEL)


def test_a_greedy_chat_answer_equals_the_offline_engines(client: openai.OpenAI, offline: TideEngine) -> None:
    answer = client.chat.completions.create(messages=MESSAGES, max_completion_tokens=20, **GREEDY)
    [ours] = expected(offline, MESSAGES, max_tokens=20)
    assert answer.choices[0].message.content == ours.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == ours.finish_reason
    again = [*MESSAGES, answer.choices[0].message.model_dump(), {"role": "user", "content": "Another."}]
    assert client.chat.completions.create(messages=again, max_tokens=2, **GREEDY).choices[0].message.content is not None


def test_messages_may_come_in_parts_and_from_a_developer(client: openai.OpenAI) -> None:
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        MESSAGES[1],
    ]
    answers = [
        client.chat.completions.create(messages=messages, max_tokens=8, **GREEDY).choices[0].message.content
        for messages in (MESSAGES, parts)
    ]
    assert answers[0] == answers[1]


def test_a_chat_answer_without_a_limit_goes_on_to_the_end_of_the_context(client: openai.OpenAI, live: Running) -> None:
    answer = client.chat.completions.create(messages=MESSAGES, extra_body={"ignore_eos": True}, **GREEDY)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == live.model.engine.engine.max_model_len


@pytest.mark.parametrize("prompt", [[10, 20, 30], ["ab", "cd"], [[10, 20], [30]]], ids=["ids", "texts", "many ids"])
def test_prompts_may_be_ids_and_many(client: openai.OpenAI, offline: TideEngine, prompt: list[object]) -> None:
    answer = client.completions.create(prompt=prompt, max_tokens=6, n=2, **GREEDY)
    many = prompt if isinstance(prompt[0], (str, list)) else [prompt]
    texts = [expected(offline, one, max_tokens=6)[0].text for one in many]
    assert [choice.index for choice in answer.choices] == list(range(2 * len(many)))
    assert [choice.text for choice in answer.choices] == [text for text in texts for _ in range(2)]


def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=MESSAGES, max_tokens=20, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            messages=MESSAGES, max_tokens=20, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    *parts, last = chunks
    assert last.choices == []
    assert last.usage == whole.usage
    assert last.tide["mean_exit_layer"] == 4
    deltas = [chunk.choices[0] for chunk in parts]
    assert len(deltas) > 3
    assert deltas[0].delta.role == "assistant"
    assert "".join(delta.delta.content for delta in deltas) == whole.choices[0].message.content
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [whole.choices[0].finish_reason]
    assert [depth for delta in deltas for depth in delta.tide["exit_layers"]] == whole.choices[0].tide["exit_layers"]
    for delta in deltas:
        assert "".join(delta.tide["tokens"]) == delta.delta.content
        assert len(delta.tide["tokens"]) == len(delta.tide["exit_layers"])


def test_a_stream_of_many_choices_adds_up(client: openai.OpenAI) -> None:
    settings = {"model": MODEL, "prompt": ["ab", "cd"], "n": 2, "seed": 5, "temperature": 1.5, "max_tokens": 12}
    whole = client.completions.create(**settings)
    texts, ends = [""] * 4, [None] * 4
    for chunk in client.completions.create(stream=True, **settings):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                assert ends[choice.index] is None, "told the end twice"
                ends[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]


def test_stop_strings_cut_whole_and_streamed_answers_alike(client: openai.OpenAI) -> None:
    text = client.completions.create(prompt="Once upon", max_tokens=30, **GREEDY).choices[0].text
    stop = text[6:8]
    settings = {"prompt": "Once upon", "max_tokens": 30, "stop": [stop, "never this"], **GREEDY}
    cut = client.completions.create(**settings).choices[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(stop)], "stop")
    assert cut.stop_reason == stop
    chunks = list(client.completions.create(stream=True, **settings))
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut.text
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_seed_repeats_and_others_differ(client: openai.OpenAI) -> None:
    def draw(seed: int) -> list[str]:
        answer = client.completions.create(model=MODEL, prompt="x", max_tokens=16, temperature=1.0, n=3, seed=seed)
        return [choice.text for choice in answer.choices]

    assert draw(7) == draw(7) != draw(8)
    assert len(set(draw(7))) > 1


def test_completion_logprobs(client: openai.OpenAI, offline: TideEngine) -> None:
    choice = client.completions.create(prompt="Once upon", max_tokens=6, logprobs=3, **GREEDY).choices[0]
    [ours] = expected(offline, "Once upon", max_tokens=6, logprobs=3)
    found = choice.logprobs
    assert found.token_logprobs == pytest.approx(
        [e[t].logprob for t, e in zip(ours.token_ids, ours.logprobs, strict=True)]
    )
    assert [len(top) for top in found.top_logprobs] == [3] * 6
    lengths = [0 if token.startswith("token_id:") else len(token) for token in found.tokens]
    assert found.text_offset == [sum(lengths[:i]) for i in range(6)]


def test_chat_logprobs_whole_and_streamed(client: openai.OpenAI) -> None:
    settings = {"messages": MESSAGES, "max_tokens": 6, "logprobs": True, "top_logprobs": 2, **GREEDY}
    content = client.chat.completions.create(**settings).choices[0].logprobs.content
    assert len(content) == 6
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    chunks = client.chat.completions.create(stream=True, **settings)
    streamed = [entry for chunk in chunks for entry in chunk.choices[0].logprobs.content]
    assert [(e.token, e.logprob) for e in streamed] == [(e.token, pytest.approx(e.logprob)) for e in content]
    plain = client.chat.completions.create(messages=MESSAGES, max_tokens=2, logprobs=True, **GREEDY)
    assert plain.choices[0].logprobs.content[0].top_logprobs == []


def test_the_async_client_streams_many_at_once(live: Running) -> None:
    async def run() -> list[str]:
        async with live.async_client() as client:

            async def one(number: int) -> str:
                stream = await client.chat.completions.create(
                    messages=[{"role": "user", "content": f"number {number}"}], max_tokens=20, stream=True, **GREEDY
                )
                return "".join([chunk.choices[0].delta.content async for chunk in stream])

            return await asyncio.gather(*(one(number) for number in range(12)))

    together = asyncio.run(run())
    with live.client() as client:
        for number in (0, 11):
            messages = [{"role": "user", "content": f"number {number}"}]
            alone = client.chat.completions.create(messages=messages, max_tokens=20, **GREEDY)
            assert together[number] == alone.choices[0].message.content
    live.wait_until_idle()


def test_models_are_listed_with_their_layers(client: openai.OpenAI) -> None:
    cards = {card.id: card for card in client.models.list()}
    assert set(cards) == {MODEL, EXITING}
    assert cards[MODEL].tide == {"num_layers": 4, "boundaries": [], "policy": "full", "certified_disagreements": []}
    assert cards[EXITING].tide["boundaries"] == [2]
    assert cards[EXITING].tide["certified_disagreements"] == [0.05]
    assert client.models.retrieve(EXITING) == cards[EXITING]


def test_exits_are_chosen_for_each_request(client: openai.OpenAI, live: Running) -> None:
    def depths(**tide: object) -> list[int]:
        settings = {"model": EXITING, "temperature": 0, "max_tokens": 16, "prompt": "Once upon"}
        answer = client.completions.create(extra_body={"tide": tide, "ignore_eos": True}, **settings)
        return answer.choices[0].tide["exit_layers"]

    # The random gate's scores lie around a half.
    assert set(depths(threshold=0.0)[1:]) == {2}
    assert set(depths(policy="full")) == set(depths(threshold=1.0)) == set(depths(threshold=0.0, min_depth=3)) == {4}
    certified = client.completions.create(
        model=EXITING, temperature=0, max_tokens=16, prompt="Once upon", extra_body={"tide": {"max_disagreement": 0.05}}
    )
    engine = live.models[EXITING].engine.engine
    [offline] = TideEngine.from_pretrained(
        engine.model.source, dataclasses.replace(engine.config, max_disagreement=0.05)
    ).generate(["Once upon"], SamplingParams(temperature=0, max_tokens=16))
    assert certified.choices[0].text == offline.outputs[0].text
    assert certified.choices[0].tide["exit_layers"] == offline.outputs[0].exit_layers


WRONG = {
    "unknown model": ({"model": "gpt-4"}, openai.NotFoundError, "model", "model_not_found"),
    "unknown field": ({"extra_body": {"tempurature": 1}}, openai.BadRequestError, "tempurature", "unknown_parameter"),
    "unknown tide field": ({"extra_body": {"tide": {"treshold": 1}}}, openai.BadRequestError, "tide.treshold", None),
    "temperature": ({"temperature": 3}, openai.BadRequestError, "temperature", "invalid_value"),
    "string for a number": ({"extra_body": {"seed": "7"}}, openai.BadRequestError, "seed", "invalid_value"),
    "penalty": ({"frequency_penalty": 0.5}, openai.BadRequestError, "frequency_penalty", None),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools", None),
    "images": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        openai.BadRequestError,
        "messages.0.content",
        None,
    ),
    "no messages": ({"messages": []}, openai.BadRequestError, "messages", None),
    "min_tokens": ({"max_tokens": 2, "extra_body": {"min_tokens": 5}}, openai.BadRequestError, "min_tokens", None),
    "top_logprobs alone": ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs", None),
    "exits of a model without": (
        {"extra_body": {"tide": {"threshold": 0.5}}},
        openai.BadRequestError,
        "tide.threshold",
        None,
    ),
    "no such certificate": (
        {"model": EXITING, "extra_body": {"tide": {"max_disagreement": 0.01}}},
        openai.BadRequestError,
        "tide.max_disagreement",
        None,
    ),
    "not certified for sampling": (
        {"model": EXITING, "temperature": 1, "extra_body": {"tide": {"max_disagreement": 0.05}}},
        openai.BadRequestError,
        "temperature",
        None,
    ),
    "context": ({"max_tokens": 1000}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
    "long prompt": (
        {"messages": [{"role": "user", "content": "x" * 500}]},
        openai.BadRequestError,
        "prompt",
        "context_length_exceeded",
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("changes", "kind", "param", "code"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said_in_openais_shape(
    client: openai.OpenAI,
    changes: dict[str, object],
    kind: type[openai.APIStatusError],
    param: str,
    code: str | None,
    stream: bool,
) -> None:
    settings = {"messages": MESSAGES, "max_tokens": 4, **GREEDY, **changes, "stream": stream}
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**settings)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert code is None or caught.value.code == code
    assert caught.value.request_id.startswith("req_")


def test_wrong_and_missing_keys(live: Running) -> None:
    for key in ("tide-wrong", "x" * 10_000):
        with live.client(api_key=key) as client, pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert key not in str(caught.value)
        assert caught.value.code == "invalid_api_key"
