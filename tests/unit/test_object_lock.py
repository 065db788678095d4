"""Who owns an output on an object store: of two that come at once one, and nobody after its lease is over."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest

from tide_ray.data import lock
from tide_ray.data.lock import LOCK_FILE, live_owner, locked
from tide_ray.data.object_path import ObjectPath
from tide_ray.data.storage import storage_path
from tide_ray.types import UserError

ELSEWHERE = {"attempt": "a", "pid": 1, "host": "elsewhere", "started": "1", "time": "noon"}


@pytest.fixture
def folder(bucket: str) -> ObjectPath:
    path = storage_path(f"{bucket}/out", "output")
    assert isinstance(path, ObjectPath)
    return path


@pytest.fixture(autouse=True)
def _short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's times are whole seconds."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "LEASE_SECONDS", 2.0)


def test_a_live_owner_keeps_others_out_until_it_is_done(folder: ObjectPath) -> None:
    with locked(folder, "first") as lease:
        with pytest.raises(UserError, match=f"is owned by process {os.getpid()} on this host"), locked(folder):
            pass
        owner = live_owner(folder)
        assert owner is not None
        assert owner["attempt"] == "first"
        assert lease.is_held
    assert live_owner(folder) is None
    with locked(folder, "second") as lease:
        assert lease.is_held


def test_the_heartbeat_goes_on_while_the_output_is_owned(folder: ObjectPath) -> None:
    with locked(folder) as lease:
        first = (folder / LOCK_FILE).stat().version
        deadline = time.monotonic() + 5
        while (folder / LOCK_FILE).stat().version == first:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert lease.is_held


def test_of_many_that_find_a_dead_owner_at_once_one_gets_the_output(folder: ObjectPath) -> None:
    dead = {**ELSEWHERE, "host": os.uname().nodename, "processes": os.readlink("/proc/self/ns/pid"), "pid": 2**22 + 1}
    (folder / LOCK_FILE).write_text(json.dumps(dead))
    start, over = threading.Barrier(8), threading.Event()
    owners, refused = [], []

    def take(name: str) -> None:
        start.wait()
        try:
            with locked(folder, name):
                owners.append(name)
                over.wait(20)
        except UserError as error:
            refused.append(error)
        if len(refused) == 7:
            over.set()

    threads = [threading.Thread(target=take, args=(f"attempt-{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(owners), len(refused)) == (1, 7)


def test_an_owner_elsewhere_that_beats_keeps_others_out(folder: ObjectPath) -> None:
    (folder / LOCK_FILE).write_text(json.dumps(ELSEWHERE))
    is_over = threading.Event()

    def beat() -> None:
        beats = 0
        while not is_over.wait(0.2):
            beats += 1
            (folder / LOCK_FILE).write_text(json.dumps({**ELSEWHERE, "beats": beats}))

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(UserError, match="owned by process 1 on host 'elsewhere' since noon"), locked(folder):
            pass
    finally:
        is_over.set()
        beating.join()


def test_an_owner_elsewhere_that_is_silent_loses_the_output_after_its_lease(folder: ObjectPath) -> None:
    (folder / LOCK_FILE).write_text(json.dumps(ELSEWHERE))
    start = time.monotonic()
    with locked(folder, "second") as lease:
        assert 0.9 < time.monotonic() - start < 10
        assert lease.is_held


def test_an_owner_whose_output_was_taken_is_stopped_and_leaves_the_new_lock_alone(folder: ObjectPath) -> None:
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), locked(folder, "first") as lease:  # noqa: PT012
        (folder / LOCK_FILE).write_text(json.dumps({**ELSEWHERE, "attempt": "second"}))
        assert not lease.is_held
        time.sleep(60)
    assert time.monotonic() - start < 30  # it was woken
    assert json.loads((folder / LOCK_FILE).read_text())["attempt"] == "second"
