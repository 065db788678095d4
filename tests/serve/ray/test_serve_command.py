"""``tide-ray serve`` itself, as a user starts it: Ray, Ray Serve's proxy, two replicas, and what happens to them."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import openai
import psutil
import pytest

from ports import free_port
from served import AUTH, KEY, Served, serving
from serving import ENGINE
from tide_ray import EngineConfig, SamplingParams, TideEngine

pytestmark = pytest.mark.slow

SECRET = "the-launch-code-is-0000"


@pytest.fixture(scope="module")
def served(tiny_llama_folder: Path) -> Iterator[Served]:
    with serving(tiny_llama_folder, "--num-replicas", "2", "--max-queued-requests", "8") as found:
        yield found


def test_greedy_answers_whole_and_streamed_equal_the_offline_engines(served: Served, tiny_llama_folder: Path) -> None:
    engine = TideEngine.from_pretrained(str(tiny_llama_folder), EngineConfig(**ENGINE))
    messages = [{"role": "user", "content": "Name a colour."}]
    [expected] = engine.generate([messages], SamplingParams(temperature=0, max_tokens=30))[0].outputs
    with served.client() as client:
        settings = {"model": served.model, "messages": messages, "max_tokens": 30, "temperature": 0}
        whole = client.chat.completions.create(**settings).choices[0]
        chunks = list(client.chat.completions.create(**settings, stream=True))
        assert whole.message.content == expected.text
        assert whole.tide["exit_layers"] == expected.exit_layers
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == expected.text
        assert [card.id for card in client.models.list()] == [served.model]


def test_the_readmes_client_gets_its_answer(served: Served) -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    [block] = [found for found in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "import openai" in found]
    for written, here in (("http://127.0.0.1:8000", served.url), ('"none"', repr(KEY)), ('"demo"', repr(served.model))):
        assert written in block
        block = block.replace(written, here)
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith(" 4.0")  # the tiny model's layers


def test_errors_have_openais_shape_behind_the_proxy_too(served: Served) -> None:
    with served.client() as client:
        for changes, kind in (
            ({"model": "none"}, openai.NotFoundError),
            ({"max_tokens": 100_000}, openai.BadRequestError),
            ({"temperature": 9}, openai.BadRequestError),
        ):
            with pytest.raises(kind) as caught:
                client.completions.create(**{"model": served.model, "prompt": "x", "max_tokens": 2, **changes})
            assert caught.value.body["message"]
    big = httpx.post(
        served.url + "/v1/completions", content=b"x" * 20_000_000, headers={**AUTH, "content-type": "application/json"}
    )
    assert (big.status_code, big.json()["error"]["code"]) == (413, "request_too_large")
    for headers in ({}, {"authorization": "Bearer wrong"}):
        assert httpx.get(served.url + "/v1/models", headers=headers).status_code == 401
    assert httpx.get(served.url + "/health").status_code == 200
    assert "text/html" in httpx.get(served.url + "/").headers["content-type"]


def test_clients_that_leave_free_their_places(served: Served) -> None:
    body = {"model": served.model, "prompt": "x", "max_tokens": 120, "stream": True, "ignore_eos": True}

    async def leave(client: httpx.AsyncClient) -> None:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                return

    async def run() -> None:
        async with httpx.AsyncClient(base_url=served.url, headers=AUTH, timeout=60) as client:
            for _ in range(5):
                await asyncio.gather(*(leave(client) for _ in range(20)))

    asyncio.run(run())
    deadline = time.monotonic() + 20
    name = f'tide_requests_running{{model="{served.model}"}} 0.0'
    while name not in httpx.get(served.url + "/metrics", headers=AUTH).text:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with served.client() as client:
        assert client.completions.create(model=served.model, prompt="x", max_tokens=3).usage.completion_tokens


def test_what_is_too_much_gets_429_and_it_recovers(served: Served) -> None:
    async def one(client: openai.AsyncOpenAI) -> str:
        try:
            body = {"ignore_eos": True}
            await client.completions.create(model=served.model, prompt="x", max_tokens=100, extra_body=body)
        except openai.RateLimitError as error:
            return f"{error.code}, retry after {error.response.headers['retry-after'].isdigit()}"
        return "answered"

    async def run() -> list[str]:
        async with served.async_client() as client:
            return await asyncio.gather(*(one(client) for _ in range(200)))

    results = asyncio.run(run())
    assert set(results) == {"answered", "server_overloaded, retry after True"}
    assert results.count("answered") >= 12
    with served.client() as client:
        assert client.completions.create(model=served.model, prompt="x", max_tokens=3).usage.completion_tokens


def test_a_killed_replica_is_replaced_and_costs_only_what_it_had_begun(served: Served) -> None:
    before = served.replicas()
    assert len(before) == 2
    results: list[str] = []

    async def keep_asking(client: openai.AsyncOpenAI, end: float) -> None:
        while time.monotonic() < end:
            try:
                stream = await client.completions.create(
                    model=served.model, prompt="x", max_tokens=60, stream=True, extra_body={"ignore_eos": True}
                )
                count = sum([len(chunk.choices[0].tide["exit_layers"]) async for chunk in stream])
                results.append("answered" if count == 60 else "cut short")
            except openai.APIError as error:
                results.append(str(getattr(error, "code", None)))

    async def run() -> None:
        async with served.async_client() as client:
            tasks = [asyncio.create_task(keep_asking(client, time.monotonic() + 8)) for _ in range(8)]
            await asyncio.sleep(2)
            os.kill(before[0], signal.SIGKILL)
            await asyncio.gather(*tasks)

    asyncio.run(run())
    failed = [result for result in results if result != "answered"]
    print(f"{len(results)} requests, failed: {failed}")
    assert len(failed) <= 8, "more than were under way"
    assert set(failed) <= {"model_unavailable"}
    deadline = time.monotonic() + 120
    while len(now := served.replicas()) < 2 or now == before:
        assert time.monotonic() < deadline, "no new replica"
        time.sleep(0.5)
    with served.client() as client:
        for _ in range(10):
            assert client.completions.create(model=served.model, prompt="x", max_tokens=3).usage.completion_tokens


def test_no_prompt_and_no_key_is_in_any_log(served: Served) -> None:
    with served.client() as client:
        client.completions.create(model=served.model, prompt=SECRET, max_tokens=3)
        for changes in ({"prompt": [SECRET, 3]}, {"prompt": SECRET * 40}, {"prompt": SECRET, "stop": 3}):
            with pytest.raises(openai.BadRequestError):
                client.completions.create(**{"model": served.model, "max_tokens": 3, **changes})
    time.sleep(2)
    logs = [path for path in served.scratch.rglob("logs/**/*") if path.is_file()]
    text = "".join(path.read_text(errors="replace") for path in logs)
    assert f"model={served.model} status=200" in text
    assert SECRET not in text
    assert KEY not in text


def test_a_signal_lets_open_requests_end(served: Served) -> None:
    """The last test of this file: it ends the server."""
    processes = [*served.replicas(), *served.fronts()]
    assert len(processes) == 3
    with served.client() as client:
        body = {"ignore_eos": True, "tide": {"stream_interval_ms": 0}}
        stream = iter(
            client.completions.create(
                model=served.model, prompt="x", n=12, max_tokens=120, stream=True, extra_body=body
            )
        )
        chunks = [next(stream)]
        served.process.send_signal(signal.SIGTERM)
        chunks += stream
    assert sum(len(choice.tide["exit_layers"]) for chunk in chunks for choice in chunk.choices) == 12 * 120
    assert served.process.wait(timeout=90) == 0
    assert not any(psutil.pid_exists(pid) for pid in processes)


def test_a_model_that_cannot_be_loaded_is_one_line_and_exit_code_two(tmp_path: Path, tiny_llama_folder: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama_folder, broken)
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:5000])
    done = subprocess.run(
        [sys.executable, "-m", "tide_ray.cli", "serve", f"x={broken}", "--port", str(free_port())],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
