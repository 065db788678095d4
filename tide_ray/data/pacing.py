"""How often Ray Data's driver looks after its tasks: when one of them has something for it, else seldom.

Ray 2.60 looks ten times a second, and asks a helper actor for resources each time. Where the driver shares a machine
with an engine, every such look interrupts it, and what the other threads of the engine compute waits as well.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback

FIRST_PAUSE, MOST_PAUSE = 0.05, 1.0
"""Seconds. What no task tells of is found as late as this: nodes that came, actors that have nothing to do, output that
was taken, and that nobody wants the data set any more (Ray gives this thread two seconds to end then)."""

COUNTS = ("num_tasks_submitted", "num_tasks_finished", "num_outputs_taken")


class Pacing(ExecutionCallback):
    """After a look that found nothing new, waits for a task that has something; each time longer, up to MOST_PAUSE."""

    def __init__(self) -> None:
        self._seen: tuple[int, ...] = ()
        self._pause = 0.0
        self._ready: set[Any] = set()

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data's executor in its own thread after each look."""
        if executor._shutdown:
            return
        operators = list(executor._topology)
        seen = tuple(getattr(operator.metrics, name) for operator in operators for name in COUNTS)
        if seen != self._seen:
            self._seen, self._pause = seen, 0.0
            self._ready.clear()
            return
        self._pause = min(max(4 * self._pause, FIRST_PAUSE), MOST_PAUSE)
        self._wait([task.get_waitable() for operator in operators for task in operator.get_active_tasks()])

    def _wait(self, tasks: list[Any]) -> None:
        """A task ends one pause: what it has may be left there, where whoever takes it is not yet done."""
        tasks = [task for task in tasks if task not in self._ready]
        if not tasks:  # then what goes on is up to whoever takes the output, who tells nobody
            time.sleep(FIRST_PAUSE)
        elif ready := ray.wait(tasks, timeout=self._pause, fetch_local=False)[0]:
            self._ready.update(ready)
            self._pause = 0.0
