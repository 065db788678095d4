"""Locust's user for ``benchmark.py serving``: one stream after the other, timed token by token.

``answer`` is a whole request, ``first token`` the time to it, ``token`` the time from one chunk to the next by the
tokens in it; response lengths count tokens. A refusal with 429 is ``refused``, waits as long as it says, and is no
failure.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import gevent
from locust import HttpUser, task

MODEL = os.environ["BENCH_MODEL"]
MAX_TOKENS = int(os.environ["BENCH_MAX_TOKENS"])
INTERVAL_MS = json.loads(os.environ["BENCH_INTERVAL_MS"])
PROMPTS = json.loads(Path(os.environ["BENCH_PROMPTS"]).read_text(encoding="utf-8"))
_numbers = itertools.count()


class Reader(HttpUser):
    """Asks again as soon as it has its answer."""

    network_timeout = 300.0

    @task
    def read(self) -> None:
        number = next(_numbers)
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            **({} if INTERVAL_MS is None else {"tide": {"stream_interval_ms": INTERVAL_MS}}),
        }
        start = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, catch_response=True, name="sent"
        ) as response:
            if response.status_code == 429:
                response.success()
                self._note("refused", start, 0)
                gevent.sleep(float(response.headers["retry-after"]))
                return
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
                return
            num_tokens = self._read_events(response, start)
            if num_tokens != MAX_TOKENS:
                response.failure(f"{num_tokens} tokens")
            else:
                response.success()
                self._note("answer", start, num_tokens)

    def _read_events(self, response: Any, start: float) -> int:
        num_tokens, last, rest = 0, start, b""
        for part in response.iter_content(chunk_size=None):
            *events, rest = (rest + part).split(b"\n\n")
            for event in events:
                data = event.removeprefix(b"data: ")
                if data == b"[DONE]":
                    continue
                count = sum(len(choice["tide"]["exit_layers"]) for choice in json.loads(data).get("choices", ()))
                if not count:
                    continue
                self._note("token" if num_tokens else "first token", last, count)
                num_tokens, last = num_tokens + count, time.perf_counter()
        return num_tokens

    def _note(self, name: str, since: float, num_tokens: int) -> None:
        seconds = (time.perf_counter() - since) / (num_tokens if name == "token" else 1)
        self.environment.events.request.fire(
            request_type="SSE",
            name=name,
            response_time=1000 * seconds,
            response_length=num_tokens,
            exception=None,
            context={},
        )
