"""Lines of OpenAI's batch files as rows of a job.

A line is ``{custom_id, method, url, body}``. Its body is read as the server reads it, and becomes one row for each
completion.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tide_ray.serve.calls import Call, chat_call, completion_call
from tide_ray.serve.errors import Failure, invalid
from tide_ray.serve.protocol import ChatCompletionRequest, CompletionRequest
from tide_ray.types import UserError

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
KEPT = ("batch_line", "batch_id", "batch_url", "batch_prompt", "batch_choice", "batch_rows")
"""Columns that the job carries over to the answers."""


def write_rows(source: Path, target: Path, model_id: str, most_tokens: int) -> tuple[int, dict[int, Failure]]:
    """Write the job's rows for every line that can be run.

    Args:
        model_id: the name that bodies use for the model.
        most_tokens: of an answer whose request gives no limit.

    Returns:
        The number of lines, and by line what those lack that cannot be run.

    Raises:
        UserError: there are no lines.
    """
    failures: dict[int, Failure] = {}
    seen: set[str] = set()
    num_lines = 0
    with target.open("w", encoding="utf-8") as file:
        for number, line in lines_of(source):
            num_lines += 1
            made = _request(line, model_id, seen)
            if isinstance(made, Failure):
                failures[number] = made
                continue
            custom_id, url, call = made
            for row in _rows(number, custom_id, url, call, most_tokens):
                file.write(json.dumps(row) + "\n")
    if not num_lines:
        raise UserError(f"input: no lines in {str(source)!r}")
    return num_lines, failures


def lines_of(source: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 0."""
    with source.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file):
            if line.strip():
                yield number, line


def _request(line: str, model_id: str, seen: set[str]) -> tuple[str, str, Call] | Failure:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return invalid("the line is not JSON", code="invalid_json")
    if not isinstance(entry, dict):
        return invalid("the line must be an object with custom_id, method, url and body")
    custom_id, url, body = entry.get("custom_id"), entry.get("url"), entry.get("body", {})
    if not isinstance(custom_id, str) or not custom_id:
        return invalid("custom_id must be a non-empty string", "custom_id")
    if custom_id in seen:
        return invalid(f"custom_id {custom_id[:100]!r} is used twice", "custom_id")
    seen.add(custom_id)
    if entry.get("method", "POST") != "POST":
        return invalid("method must be POST", "method")
    if url not in (CHAT_URL, COMPLETIONS_URL):
        return invalid(f"url must be {CHAT_URL} or {COMPLETIONS_URL}", "url")
    call = _call(url, body)
    if isinstance(call, Failure):
        return call
    assert isinstance(body, dict), "it has been read"
    if body["model"] != model_id:
        return Failure(404, f"the model {body['model'][:200]!r} does not exist", "model_not_found", "model")
    if call.params.logprobs is not None:
        return invalid("logprobs are not available in a batch", "logprobs")
    if body.get("stream"):
        return invalid("stream is not available in a batch", "stream")
    return custom_id, url, call


def _call(url: str, body: Any) -> Call | Failure:
    try:
        if url == CHAT_URL:
            return chat_call(ChatCompletionRequest.model_validate(body))
        return completion_call(CompletionRequest.model_validate(body))
    except ValidationError as error:
        problem = error.errors()[0]
        param = ".".join(str(part) for part in problem["loc"])[:200]
        return invalid(f"{param or 'body'}: {problem['msg']}", param or None, "invalid_value")


def _rows(number: int, custom_id: str, url: str, call: Call, most_tokens: int) -> Iterator[dict[str, Any]]:
    params = {name: value for name, value in dataclasses.asdict(call.params).items() if value is not None}
    params |= {
        "n": 1,
        "max_tokens": call.params.max_tokens if call.has_limit else call.params.most_tokens(most_tokens),
    }
    for prompt_index, prompt in enumerate(call.prompts):
        column = "messages" if url == CHAT_URL else "prompt" if isinstance(prompt, str) else "prompt_token_ids"
        for choice in range(call.params.n):
            own = {**params, **({} if call.params.seed is None else {"seed": call.params.seed + choice})}
            yield {
                "id": f"{number}-{prompt_index}-{choice}",
                column: prompt,
                "sampling_params": own,
                "batch_line": number,
                "batch_id": custom_id,
                "batch_url": url,
                "batch_prompt": prompt_index,
                "batch_choice": choice,
                "batch_rows": call.num_completions,
            }


def custom_id_of(line: str) -> str | None:
    """As far as the line has one."""
    try:
        value = json.loads(line)["custom_id"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return None
    return value if isinstance(value, str) else None
