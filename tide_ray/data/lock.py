"""One attempt owns an output folder at a time.

The owner's name is in a file that it touches, or on an object store rewrites, as its heartbeat. A process that died on
this machine is no owner any more. Of one on another machine only the heartbeat can be seen: it loses the folder once it
has been silent for LEASE_SECONDS, measured by the file server's or the store's clock alone. An owner that was suspended
and lost the folder notices at its next beat and stops; whatever its writers still hold back can no longer be committed
(see ``parts``), or does not count (see ``adoption``).
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from tide_ray.data.object_path import NEW, ChangedError, ObjectPath
from tide_ray.data.owner import is_here, is_running, this_process
from tide_ray.data.storage import StoragePath
from tide_ray.types import UserError

LOCK_FILE = "_lock"
GUARD_FILE = "_lock.guard"
BEAT_SECONDS = 5.0
LEASE_SECONDS = 45.0
"""Silence after which the folder of an owner on another machine may be taken: several beats, and clock-free."""


class LockFile(Protocol):
    """Where the owner's name is."""

    def read(self) -> dict[str, Any] | None:
        """The owner, None if there is none. Raises UserError for a damaged file."""

    def take(self, owner: dict[str, Any], refuse_live: Callable[[], None]) -> None:
        """Put ``owner`` in the place of the one that ``refuse_live`` has let pass; both are one step to others."""

    def beat(self) -> None:
        """Show that the owner is alive. Called after ``read``."""

    def last_beat(self) -> object:
        """What differs after every beat; None without an owner."""

    def silence(self) -> float:
        """Seconds since the owner's last beat."""

    def release(self) -> None:
        """Have no owner. Called after ``read``."""


class _FolderLock:
    """In a shared folder: the file's modification time is the heartbeat."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_FILE

    def read(self) -> dict[str, Any] | None:
        try:
            return _parsed(self._path.read_text(encoding="utf-8"), self._path)
        except FileNotFoundError:
            return None

    def take(self, owner: dict[str, Any], refuse_live: Callable[[], None]) -> None:
        # Looking and taking over must be one step: two jobs may find the same dead owner at the same time.
        with FileLock(self._path.with_name(GUARD_FILE)):
            refuse_live()
            self._path.unlink(missing_ok=True)
            with self._path.open("x", encoding="utf-8") as stream:
                json.dump(owner, stream)

    def beat(self) -> None:
        os.utime(self._path)

    def last_beat(self) -> int | None:
        try:
            return self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def silence(self) -> float:
        now = self._path.with_name(f"{LOCK_FILE}.now-{uuid.uuid4().hex}")
        now.touch()
        try:
            return (now.stat().st_mtime_ns - (self.last_beat() or 0)) / 1e9
        finally:
            now.unlink()

    def release(self) -> None:
        self._path.unlink(missing_ok=True)


class _BucketLock:
    """On an object store: every write names the version that it replaces, so that one of two comes too late.

    The object is never deleted, as a delete cannot name a version: without an owner it is ``null``.
    """

    def __init__(self, folder: ObjectPath) -> None:
        self._path = folder / LOCK_FILE
        self._version: dict[str, Any] | str = NEW
        self._owner: dict[str, Any] | None = None
        self._num_beats = 0

    def read(self) -> dict[str, Any] | None:
        try:
            text, self._version = self._path.read_version()
        except FileNotFoundError:
            self._owner, self._version = None, NEW
        else:
            self._owner = _parsed(text, self._path)
        return self._owner

    def take(self, owner: dict[str, Any], refuse_live: Callable[[], None]) -> None:
        while True:
            refuse_live()
            with suppress(FileExistsError, FileNotFoundError, ChangedError):
                self._write(owner)
                return
            if (self.read() or {}).get("attempt") == owner["attempt"]:
                return  # the client put it twice, as the answer to the first was lost

    def beat(self) -> None:
        self._num_beats += 1
        self._write({**(self._owner or {}), "beats": self._num_beats})

    def last_beat(self) -> object:
        return None if self.read() is None else self._version

    def silence(self) -> float:
        now = self._path.with_name(f"{LOCK_FILE}.now-{uuid.uuid4().hex}")
        now.touch()
        try:
            return (now.stat().st_mtime_ns - self._path.stat().st_mtime_ns) / 1e9
        finally:
            now.unlink()

    def release(self) -> None:
        with suppress(FileNotFoundError, ChangedError):
            self._write(None)

    def _write(self, owner: dict[str, Any] | None) -> None:
        self._version = self._path.put(json.dumps(owner).encode(), self._version)


class Lease:
    """Ownership of ``folder`` for as long as the heartbeat goes on."""

    def __init__(self, folder: StoragePath, attempt: str) -> None:
        self.attempt = attempt
        self._folder = folder
        self._file = _lock_file(folder)
        self._stop = threading.Event()
        self._is_lost = False
        self.wakes_by = signal.SIGINT
        self._thread = threading.Thread(target=self._beat, name="tide-lease", daemon=True)

    @property
    def is_held(self) -> bool:
        """Whether the folder still belongs to this attempt, as of now."""
        self._is_lost = self._is_lost or not self._is_named()
        return not self._is_lost

    def start(self) -> None:
        """Take the folder. Raises UserError if another live job owns it."""
        self._file.take(this_process(self.attempt), lambda: _refuse_live_owner(self._folder, self._file))
        self._thread.start()

    def release(self) -> None:
        """Give the folder up; a lock that is somebody else's by now stays."""
        self._stop.set()
        self._thread.join()
        if self.is_held:
            self._file.release()

    def _is_named(self) -> bool:
        owner = self._file.read()
        return owner is not None and owner.get("attempt") == self.attempt

    def _beat(self) -> None:
        last_beat = time.monotonic()
        while not self._stop.wait(BEAT_SECONDS):
            try:
                if self.is_held:
                    self._file.beat()
                    last_beat = time.monotonic()
            except (OSError, UserError):
                # A file server that does not answer: others may take the folder once the lease is over.
                self._is_lost = time.monotonic() - last_beat > LEASE_SECONDS
            if self._is_lost:
                # The job's main thread waits for Ray; what it commits from here on would be refused anyway. A signal
                # wakes it from what it waits in, where ``_thread.interrupt_main`` only has effect afterwards.
                signal.pthread_kill(threading.main_thread().ident or 0, self.wakes_by)
                return


@contextmanager
def locked(folder: StoragePath, attempt: str | None = None) -> Iterator[Lease]:
    """Own ``folder`` for the duration of the block. ``attempt`` names the owner.

    Waits for at most LEASE_SECONDS to see whether an owner on another machine is alive.

    Raises:
        UserError: another live job owns it.
    """
    lease = Lease(folder, attempt or uuid.uuid4().hex[:12])
    with _interrupting_signal() as lease.wakes_by:
        lease.start()
        try:
            yield lease
        finally:
            lease.release()


@contextmanager
def _interrupting_signal() -> Iterator[signal.Signals]:
    """A signal that raises KeyboardInterrupt in the main thread.

    SIGINT does not where a script started the job with ``&``: there it is ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield signal.SIGINT
        return
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        yield signal.SIGUSR1
    finally:
        signal.signal(signal.SIGUSR1, before or signal.SIG_DFL)


def live_owner(folder: StoragePath) -> dict[str, Any] | None:
    """Who owns the folder (``attempt``, ``pid``, ``host``, ``time``), None if nobody does."""
    return _live(_lock_file(folder))


def _lock_file(folder: StoragePath) -> LockFile:
    return _BucketLock(folder) if isinstance(folder, ObjectPath) else _FolderLock(folder)


def _live(file: LockFile) -> dict[str, Any] | None:
    owner = file.read()
    if owner is None:
        return None
    is_alive = is_running(owner) if is_here(owner) else file.silence() < LEASE_SECONDS
    return owner if is_alive else None


def _refuse_live_owner(folder: StoragePath, file: LockFile) -> None:
    first_beat = file.last_beat()
    while (owner := _live(file)) is not None:
        place = "this host" if is_here(owner) else f"host {owner['host']!r}"
        if is_here(owner) or file.last_beat() != first_beat:
            raise UserError(
                f"output: {str(folder)!r} is owned by process {owner['pid']} on {place} since {owner['time']}"
            )
        time.sleep(1.0)


def _parsed(text: str, path: StoragePath) -> dict[str, Any] | None:
    try:
        return json.loads(text)
    except ValueError:
        raise UserError(f"output: {str(path)!r} is damaged; remove it if no job is writing there") from None
