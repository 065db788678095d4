"""Two fronts at one address, and what the death of one costs."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import openai
import psutil
import pytest

from served import AUTH, Served, serving

pytestmark = pytest.mark.slow

NUM_PLACES = 4 + 8
"""Of the one engine: residents and queue."""


@pytest.fixture(scope="module")
def served(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    config = tmp_path_factory.mktemp("config") / "serve.yaml"
    config.write_text("ingress_deployment_config: {num_replicas: 2}\n")
    with serving(tiny_llama_folder, "--config", str(config), "--max-queued-requests", "8") as found:
        yield found


def fill(served: Served) -> None:
    """One request that takes every place of the engine, so it is refused while any other is left there."""
    with served.client() as client:
        answer = client.completions.create(
            model=served.model, prompt="x", n=NUM_PLACES, max_tokens=20, extra_body={"ignore_eos": True}
        )
    assert answer.usage.completion_tokens == 20 * NUM_PLACES


def test_connections_are_spread_over_the_fronts(served: Served) -> None:
    port = int(served.url.rpartition(":")[2])
    clients = [httpx.Client(base_url=served.url) for _ in range(30)]
    assert {client.get("/health").status_code for client in clients} == {200}
    open_ones = {
        front: [
            c
            for c in psutil.Process(front).net_connections("tcp")
            if c.status == "ESTABLISHED" and c.laddr.port == port
        ]
        for front in served.fronts()
    }
    assert len(open_ones) == 2
    assert all(open_ones.values())
    assert sum(map(len, open_ones.values())) == 30
    for client in clients:
        client.close()


def test_a_front_that_dies_costs_its_own_requests_and_no_place(served: Served) -> None:
    fronts = served.fronts()
    results: dict[int, str] = {}

    async def read(number: int) -> None:
        # A client each, so that connections are spread over the fronts.
        async with httpx.AsyncClient(base_url=served.url, headers=AUTH, timeout=60) as client:
            body = {"model": served.model, "prompt": "x", "max_tokens": 120, "stream": True, "ignore_eos": True}
            try:
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    if not results:
                        os.kill(fronts[0], signal.SIGKILL)
                    results[number] = "begun"
                    lines = [line async for line in response.aiter_lines()]
                results[number] = "answered" if "data: [DONE]" in lines else "cut"
            except httpx.HTTPError:
                results[number] = "cut"

    async def run() -> None:
        await asyncio.gather(*(read(number) for number in range(NUM_PLACES)))

    asyncio.run(run())
    assert set(results.values()) == {"answered", "cut"}
    # New connections go to the other front, and the engine has let go of what was cut.
    deadline = time.monotonic() + 5
    while True:
        try:
            fill(served)
            break
        except openai.RateLimitError:
            assert time.monotonic() < deadline, "a place is lost"
            time.sleep(0.1)
    deadline = time.monotonic() + 60
    while len(now := served.fronts()) < 2 or now == fronts:
        assert time.monotonic() < deadline, "no new front"
        time.sleep(0.2)
    for _ in range(20):
        assert httpx.get(served.url + "/health").status_code == 200
    fill(served)
