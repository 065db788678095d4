"""Calibrates several models at once, as Ray tasks with resources of their own: checkpoints, a table and ``sweep.json``.

Files in the output folder are the only state, so that a sweep that was stopped goes on where it was:

- ``NAME/``: the router checkpoint of each model
- ``sweep.json``, ``report.html``: every model's figures, or what went wrong, written anew whenever a model ends
- ``_work/``: prompts as read, and what the phases of each model have left (see ``sweep_folder``)
- ``_lock``: the owner
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tide_ray.calibrate.job import LOG_WIDTH
from tide_ray.calibrate.pages import write_sweep_page
from tide_ray.calibrate.sweep_config import SWEEP_FILE, SweepConfig
from tide_ray.calibrate.sweep_folder import PHASES, ModelFolder
from tide_ray.calibrate.sweep_job import ModelJob, located, take_inputs
from tide_ray.calibrate.sweep_nodes import fitting_gpus, has_room, joins_a_cluster
from tide_ray.calibrate.sweep_report import FAILED, KEPT, OK, print_sweep
from tide_ray.calibrate.sweep_task import Outcome, Task, run_task, task_options
from tide_ray.data.cluster import connected
from tide_ray.data.lock import locked
from tide_ray.data.run_facts import software_versions
from tide_ray.data.storage import commit_file
from tide_ray.exits.checkpoint_files import check_output_folder
from tide_ray.files import local_path
from tide_ray.types import UserError

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
POLL_SECONDS = 0.5
WORK_FOLDER, TMP_FOLDER = "_work", "_tmp"


def run_sweep(config: SweepConfig, console: Console | None = None) -> int:
    """Calibrate every model of ``config`` that is not finished in its output folder.

    Returns:
        The exit code: 0, 1 when a model failed (the others are complete), 130 when interrupted.

    Raises:
        UserError: something in ``config`` cannot be used; nothing has started.
    """
    if console is None:
        console = Console(stderr=True)
        if not console.is_terminal:
            console = Console(stderr=True, width=LOG_WIDTH)
    output = local_path(config.output, "output").resolve()
    work = _make_folder(output)
    with locked(output):
        # Writers of an attempt that is over have their temporary files here; without it they cannot commit any more.
        shutil.rmtree(work / TMP_FOLDER, ignore_errors=True)
        scratch = work / TMP_FOLDER / uuid.uuid4().hex[:12]
        scratch.mkdir(parents=True)
        try:
            models = [located(model, output) for model in config.models]
            for model in models:
                check_output_folder(Path(model.calibration.output))
            inputs = take_inputs(models, work, scratch)
            is_shared = joins_a_cluster(config.address)
            with connected(config.address, is_verbose=config.verbose):
                import ray

                nodes = [node for node in ray.nodes() if node["Alive"]]
                num_gpus = [
                    fitting_gpus(number, model.resources, model.calibration.device, nodes)
                    for number, model in enumerate(models)
                ]
                jobs = [
                    ModelJob(model, ModelFolder(work / model.name, scratch), found, gpus)
                    for model, found, gpus in zip(models, inputs, num_gpus, strict=True)
                ]
                return _Sweep(config, jobs, output, scratch, console, num_nodes=len(nodes) if is_shared else 0).run()
        finally:
            shutil.rmtree(work / TMP_FOLDER, ignore_errors=True)


def _make_folder(output: Path) -> Path:
    work = output / WORK_FOLDER
    try:
        output.mkdir(parents=True, exist_ok=True)
        foreign = [entry.name for entry in output.iterdir() if not entry.name.startswith("_")]
        if foreign and not work.is_dir():
            raise UserError(f"output: {str(output)!r} holds other files ({min(foreign)}) and no sweep")
        work.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"output: cannot write {str(output)!r}: {error.strerror}") from None
    return work


class _Sweep:
    """Tasks of all models: waiting, running and done.

    Args:
        num_nodes: of a cluster that others use as well; 0: Ray is this sweep's own.
    """

    def __init__(
        self,
        config: SweepConfig,
        jobs: Sequence[ModelJob],
        output: Path,
        scratch: Path,
        console: Console,
        *,
        num_nodes: int,
    ) -> None:
        import ray

        self._ray = ray
        self._config = config
        self._jobs = jobs
        self._output = output
        self._scratch = scratch
        self._console = console
        self._num_nodes = num_nodes
        self._waiting: deque[tuple[ModelJob, Task]] = deque()
        self._running: dict[Any, tuple[ModelJob, Task]] = {}
        self._remote = ray.remote(run_task)
        self._shown: dict[str, str] = {}
        self._started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, refresh_per_second=1, disable=not console.is_terminal)
        self._bars = {job.model.name: self._progress.add_task(job.model.name, total=1.0) for job in jobs}

    def run(self) -> int:
        try:
            with self._progress:
                for job in self._jobs:
                    self._begin(job)
                while self._waiting or self._running:
                    self._start()
                    self._collect()
        except KeyboardInterrupt:
            for ref in self._running:
                self._ray.cancel(ref, force=True)
            self._write()
            self._console.print(f"stopped; the same command goes on from what is in {self._output}")
            return EXIT_INTERRUPTED
        print_sweep(self._console, self._write(), str(self._output))
        return EXIT_FAILED if any(job.status == FAILED for job in self._jobs) else EXIT_OK

    def _begin(self, job: ModelJob) -> None:
        try:
            if said := job.begin():
                self._say(job, said)
            if job.status == KEPT:
                self._say(job, "is finished, nothing to do")
            self._waiting.extend((job, task) for task in job.next_tasks())
        except Exception as error:  # whatever is wrong with one model's files, the others go on
            self._fail(job, job.phase, str(error))

    def _go_on(self, job: ModelJob, ended: str) -> None:
        """Queue what follows the phase ``ended`` of a model, before models that have not begun."""
        try:
            tasks = job.next_tasks()
            if any(PHASES.index(task.phases[0]) <= PHASES.index(ended) for task in tasks):
                raise RuntimeError("its tasks ended and left nothing")
        except Exception as error:  # as above
            self._fail(job, job.phase, str(error))
            return
        self._waiting.extendleft((job, task) for task in reversed(tasks))
        if job.status == OK:
            self._say(job, "is calibrated")
        self._write()

    def _start(self) -> None:
        while self._waiting and self._has_room(self._waiting[0][1]):
            job, task = self._waiting.popleft()
            ref = self._remote.options(**task_options(task)).remote(task)
            self._running[ref] = (job, task)
            if self._num_nodes:  # what a cluster reports as free is some moments old
                return

    def _has_room(self, task: Task) -> bool:
        return has_room(
            task.model.resources.num_cpus,
            [other.model.resources.num_cpus for _, other in self._running.values()],
            max_parallel=self._config.max_parallel,
            max_cpus=self._config.max_cpus,
            num_nodes=self._num_nodes,
            total_cpus=self._ray.cluster_resources().get("CPU", 0),
            free_cpus=self._ray.available_resources().get("CPU", 0),
        )

    def _collect(self) -> None:
        """Wait a moment for tasks to end, and plan what follows them."""
        ended: list[Any] = []
        if self._running:
            ended, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=POLL_SECONDS)
        else:
            time.sleep(POLL_SECONDS)
        for ref in ended:
            if ref not in self._running:  # its model has failed meanwhile
                continue
            job, task = self._running.pop(ref)
            try:
                outcome: Outcome = self._ray.get(ref)
            except self._ray.exceptions.RayError as error:  # its process died again and again, or its node
                outcome = Outcome(_phase_of(job, task), _reason(error), "")
            if outcome.node:
                nodes = job.nodes.setdefault(", ".join(task.phases), [])
                nodes.extend([outcome.node] if outcome.node not in nodes else [])
            if outcome.error is not None and job.status != OK:  # its process may have died after all was done
                self._fail(job, outcome.phase, outcome.error)
            elif not self._is_busy(job):
                self._go_on(job, task.phases[-1])
        self._show()

    def _show(self) -> None:
        """Move the bars; in a log, which has none, a line for every phase that a model enters."""
        busy = {job.model.name for job, _ in self._running.values()}
        for job in self._jobs:
            name = job.model.name
            phase, share = job.progress()
            self._progress.update(self._bars[name], completed=share, description=f"{name}: {phase}")
            if name in busy and self._shown.get(name) != phase:
                self._shown[name] = phase
                if not self._console.is_terminal:
                    self._say(job, phase)

    def _is_busy(self, job: ModelJob) -> bool:
        return any(other is job for other, _ in (*self._waiting, *self._running.values()))

    def _fail(self, job: ModelJob, phase: str, error: str) -> None:
        job.fail(phase, " ".join(error.split()))
        self._say(job, f"failed in the phase {phase}: {job.error}")
        self._waiting = deque(entry for entry in self._waiting if entry[0] is not job)
        for ref in [ref for ref, entry in self._running.items() if entry[0] is job]:
            self._ray.cancel(ref, force=True)
            del self._running[ref]
        self._write()

    def _say(self, job: ModelJob, what: str) -> None:
        self._console.print(f"{job.model.name}: {what}", markup=False, highlight=False)

    def _write(self) -> list[dict[str, Any]]:
        """Put what is known into ``sweep.json``. Returns the models' rows."""
        rows = [job.row() for job in self._jobs]
        facts = {
            "started": self._started,
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": software_versions(),
            "settings": self._config.model_dump(mode="json", exclude={"models"}),
            "models": rows,
        }
        temporary = self._scratch / SWEEP_FILE
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        commit_file(temporary, self._output / SWEEP_FILE)
        write_sweep_page(self._output, rows)
        return rows


def _phase_of(job: ModelJob, task: Task) -> str:
    """The phase that a task whose process died was in: the first that is not complete."""
    try:
        job.next_tasks()
    except Exception:
        return task.phases[0]
    return job.phase


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0][:300]}"
