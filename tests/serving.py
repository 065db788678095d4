"""The application over one engine, served by uvicorn in this process: most of what Ray Serve runs, without Ray."""

from __future__ import annotations

import asyncio
import io
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import uvicorn

from tide_ray.serve.app import Server
from tide_ray.serve.config import LLMConfig, ServerConfig
from tide_ray.serve.keys import KeyRing, stored
from tide_ray.serve.model_server import ModelServer

MODEL = "tiny"
EXITING = "tiny-exits"
KEY = "tide-a-key-that-only-tests-know"
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "max_num_seqs": 4,
    "max_model_len": 128,
    "page_size": 8,
    "num_threads": 1,
}


@dataclass(frozen=True)
class Running:
    """A server that listens, and what is behind it."""

    url: str
    server: Server
    models: dict[str, ModelServer]

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": KEY, "max_retries": 0, "timeout": 60, **options}
        )

    def async_client(self, api_key: str = KEY) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._options, api_key=api_key)

    @property
    def _options(self) -> dict[str, Any]:
        return {"base_url": f"{self.url}/v1", "max_retries": 0, "timeout": 60}

    @property
    def model(self) -> ModelServer:
        return self.models[MODEL]

    def wait_until_idle(self, seconds: float = 20.0) -> None:
        """Until no request is in any engine."""
        deadline = time.monotonic() + seconds
        while any(m.num_in_flight or m.engine.engine.scheduler.residents for m in self.models.values()):
            assert time.monotonic() < deadline, "requests are left in the engine"
            time.sleep(0.01)


@contextmanager
def running(models: dict[str, ModelServer], **config: Any) -> Iterator[Running]:
    """Listen on a free port for the block."""
    keys = KeyRing([stored("tester", KEY)]) if config.pop("with_keys", True) else KeyRing()
    server = Server(models, ServerConfig(**config), keys)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    uvicorn_server = uvicorn.Server(uvicorn.Config(server.app, log_level="warning", lifespan="off"))
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await uvicorn_server.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    try:
        while not uvicorn_server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", server, models)
    finally:
        uvicorn_server.should_exit = True
        thread.join(timeout=30)
        listener.close()
    assert not thread.is_alive(), f"the server did not end: {_what_is_left(uvicorn_server, thread, *loops)}"


def _what_is_left(server: uvicorn.Server, thread: threading.Thread, *loops: asyncio.AbstractEventLoop) -> str:
    """Where the server's thread is, what its tasks wait for, and its connections."""
    text = io.StringIO()
    if frame := sys._current_frames().get(thread.ident or 0):
        traceback.print_stack(frame, file=text)
    for task in (task for loop in loops for task in asyncio.all_tasks(loop)):
        task.print_stack(file=text)
    for connection in server.server_state.connections:
        cycle = getattr(connection, "cycle", None)
        print(connection, getattr(connection, "transport", None), vars(cycle) if cycle else "no request", file=text)
    return text.getvalue()


def llm_config(name: str, folder: Path, *, engine: dict[str, Any] | None = None, **values: Any) -> LLMConfig:
    return LLMConfig(
        model_loading_config={"model_id": name, "model_source": str(folder)},
        engine_kwargs={**ENGINE, **(engine or {})},
        **{"stream_batching_interval_ms": 0, "stream_ms_per_stream": 0, **values},
    )
