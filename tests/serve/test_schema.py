"""The published schema, tried by a fuzzer: no answer is a 500, and every one has the shape that the schema says."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serving import KEY, MODEL, running
from tide_ray.serve.backend import Limits
from tide_ray.serve.model_server import ModelServer
from tide_ray.serve.protocol import ChatCompletionResponse, CompletionResponse

EXAMPLES = 60
AUTH = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def schema(make_model: Callable[..., ModelServer]) -> Iterator[Any]:
    """The schema of a server whose answers are short, whatever is asked for."""
    with running({MODEL: make_model(limits=Limits(max_completion_tokens=8))}, max_completions=8) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def checked(operation: Any, mode: GenerationMode) -> Any:
    """A test that sends what fits (or does not fit) the schema of one operation."""

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        response = case.call(headers=AUTH, timeout=30)
        statuses[response.status_code] += 1
        # What fits the schema may still be refused: more min_tokens than max_tokens, a prompt that is too long.
        case.validate_response(response, excluded_checks=[positive_data_acceptance], headers=AUTH)

    statuses: Counter[int] = Counter()
    check.statuses = statuses
    return check


def test_no_request_breaks_the_server(schema: Any) -> None:
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 6
    answered: Counter[str] = Counter()
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            # Where there is nothing to get wrong, nothing is tried.
            with contextlib.suppress(hypothesis.errors.Unsatisfiable):
                check = checked(operation, mode)
                check()
                answered[operation.label] += check.statuses[200]
                assert not any(status >= 500 for status in check.statuses), check.statuses
    assert set(answered) == {operation.label for operation in operations}
    # Were all refused for one reason, nothing would have been tried.
    assert answered["POST /v1/completions"] >= 5
    assert answered["POST /v1/chat/completions"] >= 5


def test_answers_have_the_published_shape(live: Any) -> None:
    common = {"model": MODEL, "max_tokens": 4, "n": 2, "seed": 1}
    completion = {**common, "prompt": ["a", "b"], "logprobs": 2}
    body = httpx.post(f"{live.url}/v1/completions", json=completion, headers=AUTH).json()
    CompletionResponse.model_validate(body)
    assert set(body) <= set(CompletionResponse.model_fields)
    chat = {**common, "messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2}
    body = httpx.post(f"{live.url}/v1/chat/completions", json=chat, headers=AUTH).json()
    ChatCompletionResponse.model_validate(body)
    assert set(body) <= set(ChatCompletionResponse.model_fields)
