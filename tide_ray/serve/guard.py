"""What stands before the application: who may come in, how often, and with how much.

A plain ASGI layer, so that nothing is parsed and hardly anything is read before a request has passed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from tide_ray.serve.config import ServerConfig
from tide_ray.serve.errors import DRAINING, INTERNAL, Failure, invalid
from tide_ray.serve.keys import KeyRing
from tide_ray.serve.limits import RateLimit
from tide_ray.serve.metrics import ServerMetrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("tide_ray.serve")

OPEN_PATHS = frozenset({"/", "/health", "/openapi.json"})
"""Need no key: they tell nothing about anybody's requests."""
_JSON_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
ANONYMOUS = "anonymous"
THROW_AWAY_BYTES = 2**26
THROW_AWAY_SECONDS = 5.0
"""How much of a refused body is read, and for how long."""
_KEEPS_PLACE_HEADER = b"x-request-disconnect-disabled"
"""Tells Ray Serve to let a request go on when its client has left, which would keep its place in the engine."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class Guard:
    """Checks a request and hands it on with its body already read; ``scope["state"]`` gets its id and its owner.

    Args:
        app: what answers.
        config: limits.
        keys: empty lets everybody in.
        metrics: counts what is refused.
    """

    def __init__(self, app: Application, config: ServerConfig, keys: KeyRing, metrics: ServerMetrics) -> None:
        self._app = app
        self._config = config
        self._keys = keys
        self._metrics = metrics
        self._rate = RateLimit(config.requests_per_minute)
        self.num_in_flight = 0
        self.is_draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            else:
                await self._app(scope, receive, send)
            return
        self.num_in_flight += 1
        try:
            await self._serve(scope, receive, send)
        finally:
            self.num_in_flight -= 1

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = f"req_{uuid.uuid4().hex}"
        sender = _Sender(send, request_id)
        start = time.monotonic()
        checked = self._check(scope)
        if isinstance(checked, Failure):
            await self._refuse(checked, scope, sender)
            return
        body = await self._body(scope, receive)
        if isinstance(body, Failure):
            await self._refuse(body, scope, sender, receive if body.status == 413 else None)
            return
        scope.setdefault("state", {}).update({"request_id": request_id, "owner": checked, "start": start})
        try:
            await self._app(scope, _replay(body, receive), sender)
        except Exception as error:  # of any kind: a client gets OpenAI's shape, the log no message (it may quote)
            logger.error("%s: %s in %s", request_id, type(error).__name__, scope["path"])
            if sender.has_started:
                raise
            await self._refuse(INTERNAL, scope, sender)

    def _check(self, scope: Scope) -> str | Failure:
        """The owner of the request's key, or why it may not pass."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        path, method = scope["path"], scope["method"]
        if self._config.loopback_only and not _is_loopback(headers.get(b"host", b"")):
            return Failure(403, "this server answers to its own machine only", "forbidden_host")
        if _KEEPS_PLACE_HEADER in headers:
            return invalid(
                f"the header {_KEEPS_PLACE_HEADER.decode()} is not taken: a client that leaves is not waited for"
            )
        if self.is_draining and path != "/metrics":
            return DRAINING
        owner = ANONYMOUS
        if len(self._keys) and path not in OPEN_PATHS:
            scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
            found = self._keys.owner(key.strip()) if scheme.lower() == "bearer" and key.strip() else None
            if found is None:
                what = "Incorrect" if key else "No"
                return Failure(
                    401, f"{what} API key provided. Send it as 'Authorization: Bearer KEY'", "invalid_api_key"
                )
            owner = found
        if method != "POST":
            return owner
        media_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if path in _JSON_PATHS and media_type != b"application/json":
            return Failure(415, "the body must have Content-Type: application/json", "unsupported_media_type")
        wait = self._rate.take(owner)
        if wait:
            return Failure(429, "this key has come too often; try again later", "rate_limit_exceeded", retry_after=wait)
        return owner

    async def _body(self, scope: Scope, receive: Receive) -> bytes | Failure:
        most = self._config.max_body_bytes
        too_large = Failure(413, f"the body must have at most {most} bytes", "request_too_large")
        declared = next((v for n, v in scope["headers"] if n.lower() == b"content-length"), None)
        if declared is not None:
            if not declared.isdigit():
                return invalid("Content-Length must be a number")
            if int(declared[:20]) > most:
                return too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return Failure(499, "the client left", "client_closed_request")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        return too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            return Failure(408, "the body took too long to arrive", "request_timeout")

    async def _refuse(self, failure: Failure, scope: Scope, sender: _Sender, receive: Receive | None = None) -> None:
        """Send a failure. With ``receive`` a body is still on its way: what is left of it is thrown away first, as a
        client that cannot send on may never read the answer."""
        self._metrics.refused(failure)
        logger.info("%s %s refused: %d %s", sender.request_id, scope["method"], failure.status, failure.code)
        body = json.dumps(failure.body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(name.encode(), value.encode()) for name, value in failure.headers.items()]
        if failure.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if failure.status in (408, 413):
            headers.append((b"connection", b"close"))
        await sender({"type": "http.response.start", "status": failure.status, "headers": headers})
        await sender(
            {"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body, "more_body": True}
        )
        if receive is not None:
            await _throw_away(receive)
        await sender({"type": "http.response.body", "body": b"", "more_body": False})


class _Sender:
    """``send`` with the headers that every response has."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.has_started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_started = True
            given = {name.lower() for name, _ in message["headers"]}
            added = [(name, value) for name, value in _SECURITY_HEADERS if name not in given]
            message["headers"] = [*message["headers"], *added, (b"x-request-id", self.request_id.encode())]
        await self._send(message)


async def _throw_away(receive: Receive) -> None:
    """Read a body to its end, but not for ever."""
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(THROW_AWAY_SECONDS):
            while size < THROW_AWAY_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body first, and then what comes after it: that the client left."""
    is_given = False

    async def replayed() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _is_loopback(host: bytes) -> bool:
    name = host.decode("latin-1").strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0] in _LOOPBACK
    return name.partition(":")[0] in _LOOPBACK
