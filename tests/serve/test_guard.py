"""What stands before the application: keys, sizes, rates, hosts; and what a client that misbehaves gets."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator

import httpx2 as httpx
import pytest

from serving import KEY, MODEL, Running, running
from tide_ray.serve.model_server import ModelServer

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
AUTH = {"authorization": f"Bearer {KEY}"}
BODY = {"model": MODEL, "prompt": "x", "max_tokens": 2, "temperature": 0}


@pytest.fixture
def http(live: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, headers=AUTH, timeout=30) as client:
        yield client


def error_of(response: httpx.Response) -> dict[str, object]:
    """The error of a response, after checking that it has OpenAI's shape."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    return body["error"]


@pytest.mark.parametrize("value", [None, "", "Bearer", "Basic abc", f"Bearer {KEY}x", f"Bearer x {KEY}", KEY])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", CHAT])
def test_everything_but_page_and_health_needs_a_key(live: Running, path: str, value: str | None) -> None:
    headers = {} if value is None else {"authorization": value}
    response = httpx.request("POST" if path == CHAT else "GET", live.url + path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert error_of(response)["code"] == "invalid_api_key"
    assert KEY not in response.text


def test_no_request_may_outlive_its_client(http: httpx.Client) -> None:
    """Ray Serve has a header for that, with which a client could hold a place in the engine and leave."""
    response = http.post(COMPLETIONS, json=BODY, headers={"x-request-disconnect-disabled": "?1"})
    assert response.status_code == 400
    assert "x-request-disconnect-disabled" in str(error_of(response)["message"])


@pytest.mark.parametrize("path", ["/", "/health", "/openapi.json"])
def test_page_health_and_schema_need_none(live: Running, path: str) -> None:
    response = httpx.get(live.url + path)
    assert response.status_code == 200
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v2", 404), ("GET", CHAT, 405), ("DELETE", "/v1/models", 405), ("GET", "/v1/models/none", 404),
     ("OPTIONS", CHAT, 405), ("GET", "/docs", 404)],
)  # fmt: skip
def test_unknown_paths_and_methods(http: httpx.Client, method: str, path: str, status: int) -> None:
    response = http.request(method, path)
    assert response.status_code == status
    assert error_of(response)["type"] == "invalid_request_error"
    assert "access-control-allow-origin" not in response.headers


def test_a_body_of_twenty_megabytes_is_refused_unread(live: Running, http: httpx.Client) -> None:
    response = http.post(COMPLETIONS, content=b"x" * 20_000_000, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"

    def pieces() -> Iterator[bytes]:
        for _ in range(200):
            yield b"x" * 100_000

    # Without Content-Length it is counted as it comes, and the connection may be closed in the middle of it.
    with contextlib.suppress(httpx.TransportError):
        chunked = http.post(COMPLETIONS, content=pieces(), headers={"content-type": "application/json"})
        assert chunked.status_code == 413
    assert http.post(COMPLETIONS, json=BODY).status_code == 200


BROKEN = {
    "empty": (b"", 400),
    "not JSON": (b"{", 400),
    "not UTF-8": (b'{"model": "\xff"}', 400),
    "not an object": (b"[]", 400),
    "null": (b"null", 400),
    "deep": (b"[" * 200_000, 400),
    "deep value": (b'{"model": "tiny", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    "huge number": (b'{"model": "tiny", "prompt": "x", "max_tokens": ' + b"9" * 10_000 + b"}", 400),
    "not a number": (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400),
    "infinite": (b'{"model": "tiny", "prompt": "x", "top_p": Infinity}', 400),
    "lone surrogate": (b'{"model": "tiny", "prompt": "\\ud800"}', 400),
    "lone surrogate in stop": (b'{"model": "tiny", "prompt": "x", "stop": "\\ud800", "max_tokens": 2}', 400),
    "lone surrogate as model": (b'{"model": "\\ud800", "prompt": "x"}', 400),
    "lone surrogate as field": (b'{"model": "tiny", "prompt": "x", "\\ud800": 1}', 400),
    "NUL": (b'{"model": "tiny", "prompt": "\\u0000", "max_tokens": 2}', 200),
    "emoji and right to left": ('{"model": "tiny", "prompt": "👩‍👩‍👧‍👦 שלום ́́́", "max_tokens": 2}'.encode(), 200),
    "BOM": (b"\xef\xbb\xbf" + json.dumps(BODY).encode(), 200),
    "id out of range": (b'{"model": "tiny", "prompt": [99999]}', 400),
    "no prompts": (b'{"model": "tiny", "prompt": []}', 400),
    "empty prompt": (b'{"model": "tiny", "prompt": ""}', 400),
    "doubled field": (b'{"model": "none", "model": "tiny", "prompt": "x", "max_tokens": 1}', 200),
    "special tokens": (b'{"model": "tiny", "prompt": "</s><s><|user|>", "max_tokens": 2}', 200),
}


@pytest.mark.parametrize(("content", "status"), BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_broken_body_gets_an_answer_and_never_a_500(
    http: httpx.Client, content: bytes, status: int, stream: bool
) -> None:
    if stream and content.endswith(b"}"):
        content = content[:-1] + b', "stream": true}'
    response = http.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text[:300]
    if status >= 400:
        error_of(response)
    assert len(response.content) < 5_000


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_other_media_types_are_refused(http: httpx.Client, kind: str) -> None:
    """A web page may send these to anywhere without asking; it cannot send JSON."""
    response = http.post(COMPLETIONS, content=json.dumps(BODY), headers={"content-type": kind})
    assert response.status_code == 415
    error_of(response)


def raw(url: str, request: bytes, seconds: float = 10.0) -> bytes:
    """What comes back for these very bytes until the server closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(request)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize(
    "line",
    [
        b"X-Request-Id: a\r\nSet-Cookie: stolen=1",
        b"Content-Length: -1",
        b"Content-Length: 1e9",
        b"X: \x00",
        b"Host: a\r\nHost: b",
        b"Transfer-Encoding: chunked\r\nContent-Length: 3",
    ],
)
def test_header_tricks_change_nothing(live: Running, line: bytes) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    answer = raw(live.url, head + b"Host: x\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n" + line + b"\r\n\r\n")
    assert not answer.startswith(b"HTTP/1.1 500")
    assert b"stolen" not in answer


def test_a_slow_body_is_given_up(make_model: Callable[..., ModelServer]) -> None:
    with running({MODEL: make_model()}, body_timeout_s=0.3) as server:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        start = time.monotonic()
        answer = raw(server.url, f"{head}Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{{".encode())
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - start < 5


def test_a_key_that_comes_too_often_waits(make_model: Callable[..., ModelServer]) -> None:
    with running({MODEL: make_model()}, requests_per_minute=3) as server:
        answers = [httpx.post(server.url + COMPLETIONS, json=BODY, headers=AUTH) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200] * 3 + [429] * 2
        assert error_of(answers[-1])["code"] == "rate_limit_exceeded"
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
        assert httpx.get(server.url + "/v1/models", headers=AUTH).status_code == 200


def test_without_keys_only_this_machines_names_are_answered(make_model: Callable[..., ModelServer]) -> None:
    """A page whose name resolves to 127.0.0.1 must not get at an open server through a browser."""
    with running({MODEL: make_model()}, with_keys=False, loopback_only=True) as server:
        assert httpx.post(server.url + COMPLETIONS, json=BODY).status_code == 200
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
            response = httpx.post(server.url + COMPLETIONS, json=BODY, headers={"host": host})
            assert response.status_code == 403
        for host in ("localhost:1234", "[::1]:80"):
            assert httpx.get(server.url + "/health", headers={"host": host}).status_code == 200


def test_limits_of_prompt_and_answer(make_model: Callable[..., ModelServer]) -> None:
    from tide_ray.serve.backend import Limits

    model = make_model(limits=Limits(max_prompt_tokens=5, max_completion_tokens=3))
    with running({MODEL: model}, max_completions=4) as server, httpx.Client(base_url=server.url, headers=AUTH) as http:
        long = http.post(COMPLETIONS, json={**BODY, "prompt": "x" * 6})
        assert (long.status_code, error_of(long)["code"]) == (400, "context_length_exceeded")
        assert error_of(http.post(COMPLETIONS, json={**BODY, "max_tokens": 4}))["param"] == "max_tokens"
        assert error_of(http.post(COMPLETIONS, json={**BODY, "prompt": ["x", "y", "z"], "n": 2}))["param"] == "n"
        assert http.post(COMPLETIONS, json={**BODY, "max_tokens": 3}).json()["usage"]["completion_tokens"] == 3
        without = {**BODY, "max_tokens": None, "ignore_eos": True}
        assert http.post(COMPLETIONS, json=without).json()["usage"]["completion_tokens"] == 3


def test_metrics_count_requests_tokens_and_depths(live: Running, http: httpx.Client) -> None:
    def values() -> dict[str, float]:
        lines = http.get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = values()
    http.post(COMPLETIONS, json={**BODY, "max_tokens": 5, "ignore_eos": True})
    http.post(COMPLETIONS, json={**BODY, "model": "secret-name"})
    after = values()
    name = f'tide_generated_tokens_by_depth_total{{depth="4",model="{MODEL}"}}'
    assert after[name] - before.get(name, 0) == 5
    assert after[f'tide_requests_running{{model="{MODEL}"}}'] == 0
    assert not any("secret-name" in name for name in after)


def test_no_prompt_reaches_the_log(live: Running, http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    secret = "the-launch-code-is-0000"
    with caplog.at_level(logging.DEBUG):
        http.post(COMPLETIONS, json={**BODY, "prompt": secret})
        http.post(COMPLETIONS, json={**BODY, "prompt": [secret, 3]})
        http.post(COMPLETIONS, json={**BODY, "prompt": secret, "stop": 3})
        http.post(COMPLETIONS, json={**BODY, "prompt": secret * 50, "stream": True})
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("tide_ray")]
    assert any(f"model={MODEL} status=200" in line for line in ours)
    assert not any(secret in line for line in ours)
    assert KEY not in caplog.text
