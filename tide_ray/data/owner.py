"""Which process owns an output, and whether it still runs, as far as that can be told from here."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any


def this_process(attempt: str) -> dict[str, Any]:
    """What an owner says of itself, for others to read."""
    pid = os.getpid()
    return {
        "attempt": attempt,
        "pid": pid,
        "host": socket.gethostname(),
        "processes": _process_space(),
        "started": _start_of(pid),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def is_here(owner: dict[str, Any]) -> bool:
    """Whether the owner's process would be visible from this one."""
    return (owner["host"], owner.get("processes")) == (socket.gethostname(), _process_space())


def is_running(owner: dict[str, Any]) -> bool:
    """Whether an owner that would be visible runs."""
    start = _start_of(owner["pid"])
    return start is not None and start == owner["started"]


def _process_space() -> str:
    """What tells apart containers that share a host's name: their process ids say nothing about each other."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """When the process started, None if there is no such process. A reused process id has another start."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None if Path("/proc").is_dir() else _exists(pid)
    # The second field is the command in parentheses and may hold anything; field 3 is the state, 22 the start in ticks.
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def _exists(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"
