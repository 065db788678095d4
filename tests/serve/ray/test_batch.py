"""Batch files: what goes in comes out under its own id, as the server would have answered it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from typer.testing import CliRunner

from serving import ENGINE, MODEL, Running
from tide_ray.cli import app
from tide_ray.serve.batch_requests import CHAT_URL, COMPLETIONS_URL
from tide_ray.serve.protocol import ChatCompletionResponse, CompletionResponse

MESSAGES = [{"role": "user", "content": "Name a colour."}]
GOOD: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT_URL, {"messages": MESSAGES, "max_tokens": 12, "temperature": 0}),
    "open end": (CHAT_URL, {"messages": MESSAGES, "temperature": 0}),
    "completion": (COMPLETIONS_URL, {"prompt": "Once upon", "temperature": 0}),
    "ids": (COMPLETIONS_URL, {"prompt": [[10, 20], [30]], "temperature": 0, "max_tokens": 5}),
    "sampled": (COMPLETIONS_URL, {"prompt": ["a", "b"], "n": 3, "seed": 4, "max_tokens": 9}),
    "stop": (CHAT_URL, {"messages": MESSAGES, "max_completion_tokens": 30, "temperature": 0, "stop": ["e", "a"]}),
}
BAD: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "url": ({"url": "/v1/embeddings"}, 400, "url"),
    "method": ({"method": "GET"}, 400, "method"),
    "model": ({"body": {"model": "gpt-4", "prompt": "x"}}, 404, "model"),
    "no body": ({"body": None}, 400, None),
    "temperature": ({"body": {"model": MODEL, "prompt": "x", "temperature": 3}}, 400, "temperature"),
    "misspelt": ({"body": {"model": MODEL, "prompt": "x", "max_token": 3}}, 400, "max_token"),
    "logprobs": ({"body": {"model": MODEL, "prompt": "x", "logprobs": 1}}, 400, "logprobs"),
    "stream": ({"body": {"model": MODEL, "prompt": "x", "stream": True}}, 400, "stream"),
    "too long": ({"body": {"model": MODEL, "prompt": "x" * 500}}, 400, "prompt"),
    "half too long": ({"body": {"model": MODEL, "prompt": ["x" * 500, "y"]}}, 400, "prompt"),
    "exits": ({"body": {"model": MODEL, "prompt": "x", "tide": {"threshold": 0.5}}}, 400, "tide.threshold"),
    "surrogate": ({"body": {"model": MODEL, "prompt": "\ud800"}}, 400, "prompt"),
}


class Batch:
    """A batch file in a folder of its own, answered as often as a test likes."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.source, self.target = folder / "in.jsonl", folder / "out.jsonl"
        self.errors = folder / "out.errors.jsonl"
        engine = {name: value for name, value in ENGINE.items() if name != "page_size"}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in engine.items()]
        self._flags = ["--model", str(model), "--model-id", MODEL, *flags]

    def write(self, lines: list[str]) -> None:
        self.source.write_text("".join(line + "\n" for line in lines))

    def run(self, *flags: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["batch", str(self.source), str(self.target), *self._flags, *flags])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stderr

    def read(self, path: Path) -> dict[str | None, dict[str, Any]]:
        return {line["custom_id"]: line for line in map(json.loads, path.read_text().splitlines())}


@pytest.fixture
def batch(tmp_path: Path, tiny_llama_folder: Path) -> Batch:
    return Batch(tmp_path, tiny_llama_folder)


def good_line(name: str) -> str:
    url, body = GOOD[name]
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": {"model": MODEL, **body}})


def bad_line(name: str) -> str:
    line = {"custom_id": name, "method": "POST", "url": COMPLETIONS_URL, "body": {"model": MODEL, "prompt": "x"}}
    return json.dumps({**line, **BAD[name][0]})


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_answers_equal_the_servers_and_failures_have_a_file_of_their_own(
    batch: Batch, client: openai.OpenAI, live: Running
) -> None:
    broken = ["{", "[]", '{"custom_id": "chat"}', ""]
    batch.write([*map(good_line, GOOD), *broken, *map(bad_line, BAD)])
    code, said = batch.run()
    assert (code, "6 of 21 requests answered" in said) == (3, True), said
    answers = batch.read(batch.target)
    assert set(answers) == set(GOOD)
    for name, (url, body) in GOOD.items():
        line = answers[name]
        assert (line["error"], line["response"]["status_code"]) == (None, 200)
        found = line["response"]["body"]
        (ChatCompletionResponse if url == CHAT_URL else CompletionResponse).model_validate(found)
        create = client.chat.completions.create if url == CHAT_URL else client.completions.create
        served = create(model=MODEL, **body).model_dump()
        for key in ("object", "model", "system_fingerprint"):
            assert found[key] == served[key]
        for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert found["usage"][key] == served["usage"][key]
        for ours, theirs in zip(found["choices"], served["choices"], strict=True):
            for key in ("index", "finish_reason", "tide", "text" if "text" in ours else "message"):
                expected = theirs[key]
                if isinstance(expected, dict):
                    assert ours[key].items() <= expected.items()
                else:
                    assert ours[key] == expected
    failed = batch.read(batch.errors)
    assert set(failed) == {*BAD, "chat", None}
    for name, (_, status, param) in BAD.items():
        assert failed[name]["response"]["status_code"] == status, name
        assert failed[name]["response"]["body"]["error"]["param"] == param, name
        assert failed[name]["error"]["message"]
    assert "used twice" in failed["chat"]["error"]["message"]

    # Its rows are committed: whatever happened to the output, it is written again from them.
    before = batch.read(batch.target)
    batch.target.unlink()
    code, said = batch.run()
    assert code == 3
    assert "nothing to do" in said
    after = batch.read(batch.target)
    assert {name: line["response"]["body"]["choices"] for name, line in after.items()} == {
        name: line["response"]["body"]["choices"] for name, line in before.items()
    }
    batch.write([good_line("completion")])
    code, said = batch.run()
    assert code == 2
    assert "belongs to a different job" in said


def test_a_file_without_a_line_that_can_be_run_starts_nothing(batch: Batch) -> None:
    batch.write([bad_line("url")])
    code, said = batch.run()
    assert (code, set(batch.read(batch.errors))) == (3, {"url"}), said
    assert batch.target.read_text() == ""


def test_what_cannot_be_a_batch_is_refused(batch: Batch, tmp_path: Path) -> None:
    code, said = batch.run()
    assert (code, said.startswith("error: input: no such file")) == (2, True)
    batch.write([])
    assert "no lines" in batch.run()[1]
    batch.write([good_line("chat")])
    config = tmp_path / "config.yaml"
    config.write_text("prompts: [x]\n")
    assert batch.run("--config", str(config))[1].startswith("error: prompts is settled by the batch file")
    assert batch.run("--dtype", "int3")[1].startswith("error: dtype must be")
    batch.target.write_text("mine")
    (tmp_path / "out.jsonl.job").rename(tmp_path / "elsewhere")
    assert "is there already" in batch.run()[1]
    assert batch.target.read_text() == "mine"
