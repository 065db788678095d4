"""How long Ray Data's driver rests between looks, by what it saw."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from tide_ray.data import pacing
from tide_ray.data.pacing import FIRST_PAUSE, MOST_PAUSE, Pacing


class Driver:
    """What Pacing sees of an executor with two operators, and its clock: pauses last no time here, they are noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pauses: list[float] = []
        self.tasks: list[str] = []
        self.ready: set[str] = set()
        self.operators = [self._operator(), self._operator()]
        self.is_over = False
        self._pacing = Pacing()
        monkeypatch.setattr(pacing, "time", SimpleNamespace(sleep=self.pauses.append))
        monkeypatch.setattr(pacing, "ray", SimpleNamespace(wait=self._wait))

    def _operator(self) -> SimpleNamespace:
        metrics = SimpleNamespace(num_tasks_submitted=1, num_tasks_finished=0, num_outputs_taken=0)
        return SimpleNamespace(metrics=metrics, get_active_tasks=self._active)

    def _active(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(get_waitable=lambda task=task: task) for task in self.tasks]

    def _wait(self, tasks: Sequence[str], *, timeout: float, **_: Any) -> tuple[list[str], list[str]]:
        ready, others = [t for t in tasks if t in self.ready], [t for t in tasks if t not in self.ready]
        self.pauses.append(0.0 if ready else timeout)
        return ready[:1], [*ready[1:], *others]

    def look(self, times: int = 1) -> list[float]:
        """The pauses after each look."""
        before = len(self.pauses)
        for _ in range(times):
            self._pacing.on_execution_step(SimpleNamespace(_topology=self.operators, _shutdown=self.is_over))
        return self.pauses[before:]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def test_pauses_grow_while_nothing_happens_and_end_with_what_does(driver: Driver) -> None:
    driver.tasks = ["answering"]
    assert driver.look() == [], "the first look sees what was not there before"
    pauses = driver.look(8)
    assert pauses[:2] == [FIRST_PAUSE, 4 * FIRST_PAUSE]
    assert pauses == sorted(pauses)
    assert pauses[-2:] == [MOST_PAUSE, MOST_PAUSE]

    driver.operators[1].metrics.num_outputs_taken += 1
    assert driver.look() == []
    driver.operators[0].metrics.num_tasks_submitted += 1
    assert driver.look(2) == [FIRST_PAUSE]
    driver.operators[0].metrics.num_tasks_finished += 1
    assert driver.look(2) == [FIRST_PAUSE]


def test_without_a_task_to_wait_for_looks_stay_frequent(driver: Driver) -> None:
    """Output waits for whoever reads the data set, and no task tells that some was taken."""
    assert driver.look(9) == [FIRST_PAUSE] * 8


def test_an_execution_that_is_over_is_not_held_up(driver: Driver) -> None:
    driver.tasks = ["answering"]
    driver.look(9)
    driver.is_over = True
    assert driver.look() == []


def test_a_task_that_has_something_ends_a_pause_at_once(driver: Driver) -> None:
    """Ray takes what a task has in one look and hands it on in a later one; a long pause between them held jobs up."""
    driver.tasks = ["answering", "reading"]
    assert driver.look(9)[-1] == MOST_PAUSE
    driver.ready = {"reading"}
    assert driver.look() == [0.0]
    driver.tasks, driver.ready = ["answering"], set()
    assert driver.look() == [FIRST_PAUSE]


def test_output_that_nobody_takes_yet_does_not_end_every_pause(driver: Driver) -> None:
    driver.tasks, driver.ready = ["held back", "answering"], {"held back"}
    driver.look()
    pauses = driver.look(9)
    assert pauses[:2] == [0.0, FIRST_PAUSE]
    assert pauses[-1] == MOST_PAUSE
    driver.ready = {"held back", "answering"}
    assert driver.look(2) == [0.0, FIRST_PAUSE]
