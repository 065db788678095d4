"""How long Ray Data's driver rests between looks, by what it saw."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tide_ray.data import pacing
from tide_ray.data.pacing import FIRST_PAUSE, MOST_PAUSE, Pacing


def test_pauses_grow_while_nothing_happens_and_end_with_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(pacing.time, "sleep", pauses.append)
    reads, answers = (
        SimpleNamespace(metrics=SimpleNamespace(num_tasks_submitted=1, num_outputs_taken=0)) for _ in range(2)
    )
    executor, pace = SimpleNamespace(_topology=[reads, answers]), Pacing()

    for _ in range(7):
        pace.on_execution_step(executor)
    assert pauses[:3] == [0.0, FIRST_PAUSE, 2 * FIRST_PAUSE], "the first look sees what was not there before"
    assert pauses == sorted(pauses)
    assert pauses[-2:] == [MOST_PAUSE, MOST_PAUSE]

    answers.metrics.num_outputs_taken += 1
    pace.on_execution_step(executor)
    reads.metrics.num_tasks_submitted += 1
    pace.on_execution_step(executor)
    pace.on_execution_step(executor)
    assert pauses[-3:] == [0.0, 0.0, FIRST_PAUSE]
