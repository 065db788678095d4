"""One attempt owns an output folder at a time.

The owner's name is in a file whose modification time is its heartbeat. A process that died on this machine is no owner
any more. Of one on another machine only the heartbeat can be seen: it loses the folder once it has been silent for
LEASE_SECONDS, measured by the file server's clock alone. An owner that was suspended and lost the folder notices at its
next beat and stops; whatever its writers still hold back can no longer be committed (see ``parts``).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from tide_ray.types import UserError

LOCK_FILE = "_lock"
GUARD_FILE = "_lock.guard"
BEAT_SECONDS = 5.0
LEASE_SECONDS = 45.0
"""Silence after which the folder of an owner on another machine may be taken: several beats, and clock-free."""


class Lease:
    """Ownership of ``folder`` for as long as the heartbeat goes on."""

    def __init__(self, folder: Path, attempt: str) -> None:
        self.attempt = attempt
        self._path = folder / LOCK_FILE
        self._stop = threading.Event()
        self._is_lost = False
        self._thread = threading.Thread(target=self._beat, name="tide-lease", daemon=True)

    @property
    def is_held(self) -> bool:
        """Whether the folder still belongs to this attempt, as of now."""
        self._is_lost = self._is_lost or not self._is_named()
        return not self._is_lost

    def start(self) -> None:
        self._thread.start()

    def release(self) -> None:
        """Give the folder up; a lock that is somebody else's by now stays."""
        self._stop.set()
        self._thread.join()
        if self.is_held:
            self._path.unlink(missing_ok=True)

    def _is_named(self) -> bool:
        owner = _read(self._path)
        return owner is not None and owner.get("attempt") == self.attempt

    def _beat(self) -> None:
        last_beat = time.monotonic()
        while not self._stop.wait(BEAT_SECONDS):
            try:
                if self.is_held:
                    os.utime(self._path)
                    last_beat = time.monotonic()
            except (OSError, UserError):
                # A file server that does not answer: others may take the folder once the lease is over.
                self._is_lost = time.monotonic() - last_beat > LEASE_SECONDS
            if self._is_lost:
                # The job's main thread waits for Ray; what it commits from here on would be refused anyway. A signal
                # wakes it from what it waits in, where ``_thread.interrupt_main`` only has effect afterwards.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return


@contextmanager
def locked(folder: Path, attempt: str | None = None) -> Iterator[Lease]:
    """Own ``folder`` for the duration of the block. ``attempt`` names the owner.

    Waits for at most LEASE_SECONDS to see whether an owner on another machine is alive.

    Raises:
        UserError: another live job owns it.
    """
    lease = Lease(folder, attempt or uuid.uuid4().hex[:12])
    path = folder / LOCK_FILE
    # Looking and taking over must be one step: two jobs may find the same dead owner at the same time.
    with FileLock(folder / GUARD_FILE):
        _refuse_live_owner(path)
        path.unlink(missing_ok=True)
        with path.open("x", encoding="utf-8") as stream:
            started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            json.dump({"attempt": lease.attempt, **_this_process(), "time": started}, stream)
    lease.start()
    try:
        yield lease
    finally:
        lease.release()


def live_owner(folder: Path) -> dict[str, Any] | None:
    """Who owns the folder (``attempt``, ``pid``, ``host``, ``time``), None if nobody does."""
    path = folder / LOCK_FILE
    owner = _read(path)
    if owner is None:
        return None
    is_alive = _is_running(owner) if _is_here(owner) else _silence(path) < LEASE_SECONDS
    return owner if is_alive else None


def _refuse_live_owner(path: Path) -> None:
    first_beat = _beat_time(path)
    while (owner := live_owner(path.parent)) is not None:
        place = "this host" if _is_here(owner) else f"host {owner['host']!r}"
        if _is_here(owner) or _beat_time(path) != first_beat:
            raise UserError(
                f"output: {str(path.parent)!r} is owned by process {owner['pid']} on {place} since {owner['time']}"
            )
        time.sleep(1.0)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"output: {str(path)!r} is damaged; remove it if no job is writing there") from None


def _beat_time(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _silence(path: Path) -> float:
    """Seconds since the owner's last beat. Both times are the file server's, whatever the clocks of the machines."""
    now = path.with_name(f"{LOCK_FILE}.now-{uuid.uuid4().hex}")
    now.touch()
    try:
        return (now.stat().st_mtime_ns - (_beat_time(path) or 0)) / 1e9
    finally:
        now.unlink()


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "processes": _process_space(), "started": _start_of(pid)}


def _is_here(owner: dict[str, Any]) -> bool:
    """Whether the owner's process would be visible from this one."""
    return (owner["host"], owner.get("processes")) == (socket.gethostname(), _process_space())


def _process_space() -> str:
    """What tells apart containers that share a host's name: their process ids say nothing about each other."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_running(owner: dict[str, Any]) -> bool:
    start = _start_of(owner["pid"])
    return start is not None and start == owner["started"]


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
