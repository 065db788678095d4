"""The server under load: time to first token and per token, tokens/s beside the bare engine, overload, memory.

The load comes from Locust (``bench_serving_user``), the server is ``tide-ray serve``, and the bare engine keeps as many
prompts running, each in processes of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
from bench_workload import Workload

USER_FILE = Path(__file__).with_name("bench_serving_user.py")
READY_SECONDS = 180.0
ROUND_SECONDS = 20
SERVED_AS = "served"


def run_serving(
    workload: Workload,
    *,
    concurrency: int,
    seconds: int,
    rounds: int,
    overload: int,
    overload_seconds: int,
    num_threads: int,
    max_num_seqs: int,
    exits: str | None,
    stream_interval_ms: float | None,
) -> dict[str, Any]:
    """Measure all of it; returns the facts that are printed and written.

    Bare engine and server are compared in turn, as many times as ``rounds`` says; then the server is kept under load
    for ``seconds``, flooded for ``overload_seconds``, and loaded again.
    """
    flags = ["--num-threads", str(num_threads), "--max-num-seqs", str(max_num_seqs), "--dtype", workload.dtype]
    flags += ["--max-queued-requests", str(max(0, 2 * concurrency - max_num_seqs))]
    flags += ["--exits", exits] if exits else []
    settings = (workload, concurrency, num_threads, max_num_seqs, exits)
    bare: list[float] = []
    served: list[float] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_make_bare, initargs=settings) as pool,
        _server(f"{SERVED_AS}={workload.model}", flags) as (process, url),
    ):
        prompts = Path(scratch) / "prompts.json"
        prompts.write_text(json.dumps(workload.texts), encoding="utf-8")
        load = _Locust(url, prompts, workload.max_tokens, stream_interval_ms)
        load.run(concurrency, ROUND_SECONDS)  # fills caches
        for _ in range(rounds):
            bare.append(pool.submit(_bare_rate, ROUND_SECONDS).result())
            served.append(load.run(concurrency, ROUND_SECONDS)["tokens_per_second"])
        memory = _Memory(process.pid)
        steady = load.run(concurrency, seconds)
        megabytes = memory.stop()
        flood = load.run(overload * concurrency, overload_seconds) if overload else None
        after = load.run(concurrency, ROUND_SECONDS) if overload else None
    return {
        "model": workload.model,
        "dtype": workload.dtype,
        "max_tokens": workload.max_tokens,
        "concurrency": concurrency,
        "max_num_seqs": max_num_seqs,
        "exits": exits and Path(exits).name,
        "stream_interval_ms": stream_interval_ms,
        "bare_tokens_per_second": bare,
        "served_tokens_per_second": served,
        "share_of_bare": round(statistics.median(served) / statistics.median(bare), 4) if rounds else None,
        "steady": steady,
        "megabytes": megabytes,
        "overload": flood and {"concurrency": overload * concurrency, **flood},
        "after_overload": after,
    }


class _Locust:
    def __init__(self, url: str, prompts: Path, max_tokens: int, interval_ms: float | None) -> None:
        self._url = url
        asked = {"PROMPTS": str(prompts), "MAX_TOKENS": str(max_tokens), "INTERVAL_MS": json.dumps(interval_ms)}
        asked["MODEL"] = SERVED_AS
        self._environment = {**os.environ, **{f"BENCH_{name}": value for name, value in asked.items()}}

    def run(self, users: int, seconds: int) -> dict[str, Any]:
        command = [sys.executable, "-m", "locust", "-f", str(USER_FILE), "--headless", "--json", "--host", self._url]
        command += ["-u", str(users), "-r", str(users), "-t", f"{seconds}s", "--skip-log", "--exit-code-on-error", "0"]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=True)
        entries = {entry["name"]: entry for entry in json.loads(done.stdout[done.stdout.index("[") :])}
        tokens = [entries[name] for name in ("first token", "token") if name in entries]
        count = sum(entry["total_content_length"] for entry in tokens)
        span = max(e["last_request_timestamp"] for e in entries.values()) - min(
            e["start_time"] for e in entries.values()
        )
        return {
            "seconds": round(span, 1),
            "answers": entries.get("answer", {}).get("num_requests", 0),
            "failures": entries.get("sent", {}).get("num_failures", 0),
            "refused": entries.get("refused", {}).get("num_requests", 0),
            "tokens_per_second": round(count / span, 1),
            "first_token_ms": _percentiles(entries.get("first token")),
            "token_ms": _percentiles(entries.get("token")),
        }


def _percentiles(entry: dict[str, Any] | None) -> dict[str, float] | None:
    """p50 and p95 of Locust's histogram, which has two significant digits."""
    if entry is None:
        return None
    times = sorted((float(time_ms), count) for time_ms, count in entry["response_times"].items())
    total, found = sum(count for _, count in times), {}
    for share in (0.5, 0.95):
        reached = 0
        for time_ms, count in times:
            reached += count
            if reached >= share * total:
                found[f"p{share:.0%}".rstrip("%")] = time_ms
                break
    return found


class _Memory:
    """Resident memory of a process and its descendants, sampled."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._samples: list[float] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while not self._is_over.wait(2.0):
            total = 0
            for process in [self._root, *self._root.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
            self._samples.append(total / 1e6)

    def stop(self) -> dict[str, float]:
        """Means of the first and of the last third, in MB."""
        self._is_over.set()
        self._thread.join()
        third = max(1, len(self._samples) // 3)
        return {
            "first_third": round(statistics.mean(self._samples[:third]), 1),
            "last_third": round(statistics.mean(self._samples[-third:]), 1),
        }


@contextlib.contextmanager
def _server(model: str, flags: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tide_ray.cli", "serve", model, "--port", str(port), *flags]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stderr=said)
        try:
            deadline = time.monotonic() + READY_SECONDS
            while b"serving " not in os.pread(said.fileno(), 100_000, 0):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(os.pread(said.fileno(), 100_000, 0).decode(errors="replace"))
                time.sleep(0.2)
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


_bare: dict[str, Any] = {}
"""What the bare engine's process keeps from one round to the next."""


def _make_bare(workload: Workload, concurrency: int, num_threads: int, max_num_seqs: int, exits: str | None) -> None:
    from tide_ray import EngineConfig, TideEngine

    config = EngineConfig(dtype=workload.dtype, num_threads=num_threads, max_num_seqs=max_num_seqs, exits=exits)
    engine = TideEngine.from_pretrained(workload.model, config)
    engine.warm_up()
    _bare.update(engine=engine, workload=workload, concurrency=concurrency, number=0)


def _bare_rate(seconds: float) -> float:
    """Tokens/s of the engine alone with as many prompts at a time, from nothing as the server's clients do."""
    from tide_ray import SamplingParams

    engine, workload = _bare["engine"], _bare["workload"]
    params = SamplingParams(temperature=0, max_tokens=workload.max_tokens, ignore_eos=True)
    prompts = [[{"role": "user", "content": text}] for text in workload.texts]
    running: set[str] = set()
    count, start = engine.stats.num_generated_tokens, time.perf_counter()
    while time.perf_counter() < start + seconds:
        while len(running) < _bare["concurrency"]:
            _bare["number"] += 1
            running.add(str(_bare["number"]))
            engine.add_request(str(_bare["number"]), prompts[_bare["number"] % len(prompts)], params)
        running -= {output.request_id for output in engine.step()}
    rate = (engine.stats.num_generated_tokens - count) / (time.perf_counter() - start)
    for request_id in running:
        engine.abort(request_id)
    return round(rate, 1)
