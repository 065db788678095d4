"""Failures as values: they cross processes without a traceback, which could carry a prompt into a log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Failure:
    """An answer in OpenAI's shape for a request that failed. ``retry_after``: seconds, where trying again may help."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: float | None = None

    @property
    def type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        if self.status == 401:
            return "authentication_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after is not None:
            return {"retry-after": str(max(1, math.ceil(self.retry_after)))}
        # The official clients repeat 408 and 5xx unless told not to, which only adds to what made it fail.
        return {"x-should-retry": "false"} if self.status in (408, 500, 504) else {}


def invalid(message: str, param: str | None = None, code: str | None = None) -> Failure:
    """400 for what a client got wrong."""
    return Failure(400, message, code, param)


def from_user_error(error: object, params: Mapping[str, str] | None = None) -> Failure:
    """400 from a UserError, whose message begins with the name of the field.

    Args:
        error: the error.
        params: our names of fields to the API's.
    """
    message = " ".join(str(error).split())
    ours = message.split(" ", 1)[0].rstrip(":")
    name = (params or {}).get(ours, ours if ours.isidentifier() else None)
    if name is not None and name != ours:
        message = name + message[len(ours) :]
    return invalid(message, name)


ENGINE_DEAD = Failure(503, "the engine of this model failed; it is being restarted", "engine_dead", retry_after=5)
UNAVAILABLE = Failure(503, "no replica of this model can be reached", "model_unavailable", retry_after=5)
DRAINING = Failure(503, "the server is shutting down", "draining", retry_after=10)
TIMED_OUT = Failure(504, "the request took longer than the server allows", "request_timeout")
CANCELLED = Failure(499, "the client left", "client_closed_request")
INTERNAL = Failure(500, "the server had an error while answering; it has been logged", "internal_error")
