"""Who owns an output folder: live processes here, heartbeats elsewhere, and nobody twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tide_ray.data import lock
from tide_ray.data.lock import LOCK_FILE, live_owner, locked
from tide_ray.types import UserError

OWN = """
import pathlib, sys
from tide_ray.data.lock import locked
with locked(pathlib.Path(sys.argv[1]), "first"):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "LEASE_SECONDS", 2.5)


@contextmanager
def another_owner(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWN, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def lock_of_another_host(folder: Path) -> Path:
    path = folder / LOCK_FILE
    path.write_text(json.dumps({"attempt": "a", "pid": 1, "host": "elsewhere", "started": "1", "time": "noon"}))
    return path


def test_a_live_owner_keeps_others_out_and_a_dead_one_does_not(tmp_path: Path) -> None:
    with another_owner(tmp_path) as owner:
        with pytest.raises(UserError, match=f"is owned by process {owner.pid} on this host"), locked(tmp_path):
            pass
        assert live_owner(tmp_path) is not None
        owner.kill()  # not waited for: a zombie still has a process id
        while Path(f"/proc/{owner.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        assert live_owner(tmp_path) is None
        assert (tmp_path / LOCK_FILE).exists()
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
        assert not (tmp_path / LOCK_FILE).exists()


def test_an_owner_elsewhere_that_beats_keeps_others_out(tmp_path: Path) -> None:
    path = lock_of_another_host(tmp_path)
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(0.2):
            os.utime(path)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(UserError, match="owned by process 1 on host 'elsewhere' since noon"), locked(tmp_path):
            pass
    finally:
        is_over.set()
        beating.join()
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_an_owner_elsewhere_that_is_silent_loses_the_folder_after_its_lease(tmp_path: Path) -> None:
    path = lock_of_another_host(tmp_path)
    start = time.monotonic()
    with locked(tmp_path, "second"):
        assert time.monotonic() - start > 2
        assert json.loads(path.read_text())["attempt"] == "second"
    os.utime(lock_of_another_host(tmp_path), (0, 0))
    start = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - start < 2


def test_the_same_process_id_in_another_container_says_nothing(tmp_path: Path) -> None:
    with locked(tmp_path):
        mine = json.loads((tmp_path / LOCK_FILE).read_text())
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps({**mine, "processes": "pid:[1]"}))
    assert live_owner(tmp_path) is not None
    os.utime(path, (0, 0))
    assert live_owner(tmp_path) is None


def test_a_process_id_in_use_again_is_not_the_owner(tmp_path: Path) -> None:
    """A container restarts with the host name and process ids of the one that died; its lock must not stand."""
    with locked(tmp_path):
        mine = json.loads((tmp_path / LOCK_FILE).read_text())
    (tmp_path / LOCK_FILE).write_text(json.dumps({**mine, "started": "1"}))
    with locked(tmp_path):
        pass


def test_the_heartbeat_goes_on_while_the_folder_is_owned(tmp_path: Path) -> None:
    with locked(tmp_path) as lease:
        first = (tmp_path / LOCK_FILE).stat().st_mtime_ns
        deadline = time.monotonic() + 5
        while (tmp_path / LOCK_FILE).stat().st_mtime_ns == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert lease.is_held


def test_an_owner_whose_folder_was_taken_is_stopped_and_leaves_the_new_lock_alone(tmp_path: Path) -> None:
    path = tmp_path / LOCK_FILE
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), locked(tmp_path, "first") as lease:  # noqa: PT012
        path.write_text(json.dumps({**json.loads(path.read_text()), "attempt": "second"}))
        assert not lease.is_held
        time.sleep(60)
    assert time.monotonic() - start < 30  # it was woken
    assert json.loads(path.read_text())["attempt"] == "second"
