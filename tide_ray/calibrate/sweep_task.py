"""What one Ray task of a sweep does: phases of one model, or some shards of a phase. Files are all that it leaves."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tide_ray.calibrate.calibrate import make_routers, new_calibration, open_engine
from tide_ray.calibrate.calibration import fitting_examples
from tide_ray.calibrate.corpus import Example, answer, answers, split
from tide_ray.calibrate.fitting import Fitter
from tide_ray.calibrate.pages import write_report
from tide_ray.calibrate.statistics import FitStatistics
from tide_ray.calibrate.sweep_config import SweepModel
from tide_ray.calibrate.sweep_folder import ModelFolder, shards
from tide_ray.calibrate.sweep_report import summary
from tide_ray.engine.memory import return_freed_memory
from tide_ray.messages import one_line

SAVE_SECONDS = 30.0
"""Statistics may be large files: within a task they are written no more often than this."""
KV_SHARE = 0.5
LOADING = "load"


@dataclass(frozen=True, slots=True)
class Task:
    """Phases of ``model`` in their order; ``shards`` of the only phase, None: all that are left.

    ``prompts``: file with one prompt as JSON a line; None: the model is calibrated on text. ``num_gpus``: of this task.
    """

    model: SweepModel
    folder: ModelFolder
    prompts: str | None
    num_gpus: float
    phases: tuple[str, ...]
    shards: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a task ended: its last phase, in one line what went wrong there (None: nothing), and its node."""

    phase: str
    error: str | None
    node: str


def run_task(task: Task) -> Outcome:
    """Do what ``task`` says. What goes wrong is an outcome, so that the sweep goes on."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    phase = LOADING
    try:
        worker = _Worker(task)
        for phase in task.phases:
            getattr(worker, phase)()
    except Exception as error:  # whatever a model does wrong is this model's failure
        text = one_line(error, 500)
        return Outcome(phase, text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}", node)
    finally:
        return_freed_memory()
    return Outcome(phase, None, node)


class _Worker:
    """The model, loaded, and its phases."""

    def __init__(self, task: Task) -> None:
        resources = task.model.resources
        # A process may have run a task with other threads before, so none is left to torch's choice.
        num_threads = task.model.calibration.num_threads or max(1, int(resources.num_cpus))
        self.task = task
        self.folder = task.folder
        self.config = task.model.calibration.model_copy(update={"num_threads": num_threads})
        # Tasks that share a GPU must not take half of what the other left.
        share = KV_SHARE * min(1.0, task.num_gpus or 1.0)
        self.engine = open_engine(self.config, kv_memory_fraction=share)
        self.calibration = new_calibration(self.config, self.engine, lambda _what, _share: None)

    def answers(self) -> None:
        """Answer the prompts of each shard, or cut the text."""
        done = self.folder.answered_shards()
        if self.task.prompts is None:
            if not done:
                started = time.perf_counter()
                examples = answers(self.config, self.engine, lambda _what, _share: None)
                self.folder.write_answers(0, dict(enumerate(examples)), time.perf_counter() - started)
            return
        with Path(self.task.prompts).open(encoding="utf-8") as lines:
            prompts = [json.loads(line) for line in lines]
        for number, part in enumerate(shards(len(prompts))):
            if number in done or not self._is_ours(number):
                continue
            started = time.perf_counter()
            answered = answer(prompts[part.start : part.stop], self.config, self.engine, lambda _what, _share: None)
            by_prompt = {part.start + place: example for place, example in answered.items()}
            self.folder.write_answers(number, by_prompt, time.perf_counter() - started)

    def fit(self) -> None:
        """Add up statistics of each shard of the examples that are fitted on."""
        self._release_pages()
        examples = fitting_examples(split(self.folder.answers()[0], self.config.seed))
        parts = shards(len(examples))
        ours = [number for number in range(len(parts)) if self._is_ours(number)]
        if self.task.shards is None:
            ours = [number for number in ours if number not in self.folder.fitted_shards()]
        if not ours:
            return
        fitter = self.calibration.fitter()
        statistics = fitter.new_statistics()
        done, seconds = self.folder.sums_of(ours[0])
        if done:  # this task has run before, and its process died
            statistics.restore(self.folder.read_sums(ours[0]))
        saved = started = time.perf_counter()
        for number in ours:
            if number in done:
                continue
            fitter.collect(statistics, examples, parts[number].start, parts[number].stop)
            done.append(number)
            now = time.perf_counter()
            if now - saved >= SAVE_SECONDS or number == ours[-1]:
                self.folder.write_sums(ours[0], statistics.tensors(), done, seconds + now - started)
                saved = time.perf_counter()

    def routers(self) -> None:
        """Everything else, from what the phases before have left; saves the checkpoint."""
        self._release_pages()
        examples, answer_seconds = self.folder.answers()
        fit_seconds = sum(self.folder.sums_of(first)[1] for first in self.folder.sums_files())
        before = {"generate": answer_seconds, "fit": fit_seconds}
        routers = make_routers(self.calibration, self.engine, examples, before, self._collected)
        routers.save(self.config.output)
        write_report(self.config.output)
        self.folder.write_done({**summary(routers), "routers": routers.identity})

    def _collected(self, fitter: Fitter, _examples: Sequence[Example]) -> FitStatistics:
        merged = fitter.new_statistics()
        for first in self.folder.sums_files():
            part = fitter.new_statistics()
            part.restore(self.folder.read_sums(first))
            merged.merge(part)
        return merged

    def _is_ours(self, shard: int) -> bool:
        return self.task.shards is None or shard in self.task.shards

    def _release_pages(self) -> None:
        """Whole sequences attend within their launch: what generation left in the pages is not needed any more."""
        self.engine.runner.pools.release()
        return_freed_memory()


def task_options(task: Task) -> dict[str, Any]:
    """Options of the Ray task; a process that died is started again by Ray, a failure is not repeated."""
    name = f"calibrate {task.model.name} ({', '.join(task.phases)})"
    return {**task.model.resources.options(task.num_gpus), "max_retries": 2, "retry_exceptions": False, "name": name}
