"""How often Ray Data's driver looks after its tasks: less often while nothing happens.

Ray 2.60 looks ten times a second, and asks a helper actor for resources each time. Where the driver shares a machine
with an engine, every such look interrupts it, and what the other threads of the engine compute waits as well.
"""

from __future__ import annotations

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

FIRST_PAUSE, MOST_PAUSE = 0.05, 0.3
"""Seconds. Answers take seconds, and actors have batches waiting in them; the pause is what they are found later by."""


class Pacing(ExecutionCallback):
    """Lengthens the pause between looks that find nothing new; after one that does there is none."""

    def __init__(self) -> None:
        self._seen: tuple[int, ...] = ()
        self._pause = 0.0

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data's executor in its own thread after each look."""
        metrics = [operator.metrics for operator in executor._topology]
        seen = tuple(count for one in metrics for count in (one.num_tasks_submitted, one.num_outputs_taken))
        is_quiet = seen == self._seen
        self._seen = seen
        self._pause = min(max(2 * self._pause, FIRST_PAUSE), MOST_PAUSE) if is_quiet else 0.0
        time.sleep(self._pause)
