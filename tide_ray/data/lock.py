"""One job owns an output folder at a time.

The lock is a file that names its owner. A process that died on this host is no owner any more; whether one on another
host is alive cannot be seen from here, so its lock stands until somebody removes it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from tide_ray.types import UserError

LOCK_FILE = "_lock"
GUARD_FILE = "_lock.guard"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Own ``folder`` for the duration of the block.

    Raises:
        UserError: another live job owns it.
    """
    path = folder / LOCK_FILE
    # Looking and taking over must be one step: two jobs may find the same dead owner at the same time.
    with FileLock(folder / GUARD_FILE):
        _refuse_live_owner(path)
        path.unlink(missing_ok=True)
        with path.open("x", encoding="utf-8") as stream:
            json.dump({**_this_process(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}, stream)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _refuse_live_owner(path: Path) -> None:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except ValueError:
        raise UserError(f"output: {str(path)!r} is damaged; remove it if no job is writing there") from None
    if owner["host"] != socket.gethostname():
        raise UserError(
            f"output: {str(path.parent)!r} is owned by process {owner['pid']} on host {owner['host']!r} since "
            f"{owner['time']}; remove {str(path)!r} if that job is gone"
        )
    if _start_of(owner["pid"]) is not None and _start_of(owner["pid"]) == owner["started"]:
        raise UserError(
            f"output: {str(path.parent)!r} is owned by process {owner['pid']} on this host since {owner['time']}"
        )


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "started": _start_of(pid)}


def _start_of(pid: int) -> str | None:
    """When the process started, None if there is no such process. A reused process id has another start."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None if Path("/proc").is_dir() else _exists(pid)
    # The second field is the command in parentheses and may hold anything; field 22 is the start time in ticks.
    return stat.rpartition(")")[2].split()[19]


def _exists(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"
