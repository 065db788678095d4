"""Requests that end early and engines that fail: nothing is leaked, nobody waits for ever."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable

import httpx2 as httpx
import openai
import pytest

from serving import KEY, MODEL, Running, running
from tide_ray.serve.model_server import ModelServer

AUTH = {"authorization": f"Bearer {KEY}"}
COMPLETIONS = "/v1/completions"
LONG = {"model": MODEL, "prompt": "x", "max_tokens": 120, "temperature": 0, "ignore_eos": True}


def slowed(model: ModelServer, seconds: float) -> None:
    """Make every step of the engine take at least ``seconds``."""
    engine = model.engine.engine
    step = engine.step

    def slow_step() -> object:
        time.sleep(seconds)
        return step()

    engine.step = slow_step  # type: ignore[method-assign]


async def leave_after(client: httpx.AsyncClient, num_chunks: int) -> None:
    async with client.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as response:
        async for _ in response.aiter_lines():
            num_chunks -= 1
            if num_chunks <= 0:
                return


def test_leaving_a_stream_frees_its_slot_within_a_step(make_model: Callable[..., ModelServer]) -> None:
    model = make_model()
    slowed(model, 0.05)
    with running({MODEL: model}) as server:
        engine = model.engine.engine
        connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        body = b'{"model":"tiny","prompt":"x","max_tokens":120,"stream":true,"ignore_eos":true}'
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        connection.sendall(
            f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        )
        received = b""
        while received.count(b"data:") < 3:
            received += connection.recv(65536)
        assert len(engine.scheduler.residents) == 1
        connection.close()
        steps = engine.stats.num_steps
        while engine.scheduler.residents:
            time.sleep(0.001)
        # The step that runs when the client leaves ends first; a second one may have begun before the news arrived.
        assert engine.stats.num_steps - steps <= 2
        server.wait_until_idle()


def test_leaving_before_the_answer_aborts_it_too(make_model: Callable[..., ModelServer]) -> None:
    model = make_model()
    slowed(model, 0.05)
    with running({MODEL: model}) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + COMPLETIONS, json=LONG, headers=AUTH, timeout=0.3)
        start = time.monotonic()
        server.wait_until_idle()
        assert time.monotonic() - start < 2, "it went on to its end"
        assert model.engine.engine.stats.num_finished_requests == 0


def test_a_thousand_clients_that_leave_mid_stream_leak_nothing(live: Running) -> None:
    engine = live.model.engine.engine
    free_before = engine.scheduler.pool.num_free

    async def run() -> None:
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=live.url, headers=AUTH, timeout=60, limits=limits) as client:
            for _ in range(20):
                await asyncio.gather(*(leave_after(client, number % 4) for number in range(50)))

    asyncio.run(run())
    live.wait_until_idle()
    assert engine.scheduler.pool.num_free == free_before
    assert not engine.has_unfinished_requests()
    assert live.server.app.num_in_flight == 0
    with live.client() as client:
        assert client.completions.create(model=MODEL, prompt="x", max_tokens=3).usage.completion_tokens


def test_what_is_too_much_gets_429_and_the_rest_an_answer(make_model: Callable[..., ModelServer]) -> None:
    model = make_model(max_queued_requests=4)
    slowed(model, 0.005)
    with running({MODEL: model}) as server:

        async def run() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, headers=AUTH, timeout=60) as client:
                posts = [client.post(COMPLETIONS, json={**LONG, "max_tokens": 40}) for _ in range(80)]
                return await asyncio.gather(*posts)

        answers = asyncio.run(run())
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 8  # four residents and four that wait
        for answer in answers:
            if answer.status_code == 429:
                assert answer.json()["error"]["code"] == "server_overloaded"
                assert 1 <= int(answer.headers["retry-after"]) <= 60
        server.wait_until_idle()
        assert httpx.post(server.url + COMPLETIONS, json=LONG, headers=AUTH, timeout=60).status_code == 200
        many = httpx.post(server.url + COMPLETIONS, json={**LONG, "n": 9}, headers=AUTH)
        assert (many.status_code, many.json()["error"]["param"]) == (400, "n")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_request_that_takes_too_long_is_ended(make_model: Callable[..., ModelServer], stream: bool) -> None:
    model = make_model()
    slowed(model, 0.05)
    with running({MODEL: model}, request_timeout_s=0.5) as server, server.client() as client:
        with pytest.raises(openai.APIError) as caught:
            list(client.completions.create(**LONG_OPENAI, stream=stream))
        assert caught.value.code == "request_timeout"
        assert stream or caught.value.status_code == 504
        server.wait_until_idle(2)


LONG_OPENAI = {
    "model": MODEL,
    "prompt": "x",
    "max_tokens": 120,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}


def test_a_dead_engine_is_told_to_clients_and_to_health_checks(make_model: Callable[..., ModelServer]) -> None:
    model = make_model()
    with running({MODEL: model}) as server, server.client() as client:
        assert httpx.get(server.url + "/health").json() == {"status": "ok", "models": [MODEL]}

        def fail() -> object:
            raise RuntimeError("out of memory")

        stream = client.completions.create(**LONG_OPENAI, stream=True)
        next(iter(stream))
        model.engine.engine.step = fail  # type: ignore[method-assign]
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert caught.value.code == "engine_dead"
        with pytest.raises(openai.InternalServerError) as caught_later:
            client.completions.create(**LONG_OPENAI)
        assert (caught_later.value.status_code, caught_later.value.code) == (503, "engine_dead")
        assert not model.is_healthy
        health = httpx.get(server.url + "/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, "unhealthy")


def test_an_engine_that_hangs_is_unhealthy(make_model: Callable[..., ModelServer]) -> None:
    model = make_model(hang_seconds=0.2)
    engine, may_go = model.engine.engine, threading.Event()
    step = engine.step

    def hang() -> object:
        may_go.wait(10)
        return step()

    with running({MODEL: model}) as server:
        engine.step = hang  # type: ignore[method-assign]
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + COMPLETIONS, json=LONG, headers=AUTH, timeout=0.4)
        assert not model.is_healthy
        assert httpx.get(server.url + "/health").status_code == 503
        may_go.set()
        deadline = time.monotonic() + 10
        while not model.is_healthy:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_draining_server_ends_what_it_has_and_takes_no_more(make_model: Callable[..., ModelServer]) -> None:
    model = make_model()
    slowed(model, 0.01)
    with running({MODEL: model}) as server, server.client() as client:
        stream = iter(client.completions.create(**LONG_OPENAI, stream=True))
        next(stream)
        server.server.app.is_draining = True
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**LONG_OPENAI)
        assert (caught.value.status_code, caught.value.code) == (503, "draining")
        assert int(caught.value.response.headers["retry-after"]) > 0
        assert httpx.get(server.url + "/health").status_code == 503
        assert len(list(stream)) > 50
        assert server.server.app.num_in_flight == 0


def test_a_client_that_reads_slowly_holds_up_nobody(live: Running) -> None:
    body = b'{"model":"tiny","prompt":"x","max_tokens":120,"stream":true,"ignore_eos":true,"logprobs":50}'
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", int(live.url.rsplit(":", 1)[1])))
        slow.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        slow.recv(100)
        with live.client() as client:
            for _ in range(3):
                client.completions.create(model=MODEL, prompt="y", max_tokens=5)
        deadline = time.monotonic() + 10
        while live.model.engine.engine.scheduler.residents:  # the engine does not wait for it
            assert time.monotonic() < deadline
            time.sleep(0.01)
    live.wait_until_idle()
