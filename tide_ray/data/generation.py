"""The part of the job that needs Ray: the data set from what is left to do to committed parts, and how it stops."""

from __future__ import annotations

import _thread
import dataclasses
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tide_ray.data.cluster import connected, quiet_ray
from tide_ray.data.drain import DrainRequest, sigterm_calls, terminate, todo_rows
from tide_ray.data.job_config import GenerateJobConfig
from tide_ray.data.job_folder import JobFolder
from tide_ray.data.logs import JobLog
from tide_ray.data.progress import JobProgress, display_for
from tide_ray.data.reports import Reports
from tide_ray.data.run_facts import job_id, prefix_hit_rate
from tide_ray.data.schema import optional_columns
from tide_ray.data.snapshot import snapshot_files
from tide_ray.data.storage import StoragePath
from tide_ray.exits.certificates import pick
from tide_ray.exits.checkpoint_files import read_certificates
from tide_ray.types import JobError, UserError

if TYPE_CHECKING:
    from tide_ray.data.actor import Generator, GeneratorOptions
    from tide_ray.data.processor import TideProcessorConfig
    from tide_ray.data.shadow import ShadowOptions

MIN_BATCH_SIZE, MAX_BATCH_SIZE = 32, 128
"""Larger batches hold finished rows back behind slow ones, see ``processor.concurrent_batches``."""
BATCHES_PER_JOB = 4096
"""The driver keeps 16 kB and more for every batch that Ray Data has run."""
MAX_ROWS_PER_PART = 4096
PARTS_PER_JOB = 50
ERROR_POLL_SECONDS = 1.0
WRITE_SECONDS = 20.0
"""After a drain, how long what is finished may take to be written before the job ends all the same."""


def rows_per_batch(config: GenerateJobConfig, num_rows: int) -> int:
    """As the job says, else more where rows are many; few rows must still reach every actor, whichever is up first."""
    wanted = config.batch_size or min(max(MIN_BATCH_SIZE, num_rows // BATCHES_PER_JOB), MAX_BATCH_SIZE)
    return max(1, min(wanted, -(-num_rows // config.most_actors)))


def default_rows_per_part(num_rows: int, batch_size: int) -> int:
    """Small enough that an interrupted job loses little, large enough that a big one does not drown in files."""
    return max(batch_size, min(MAX_ROWS_PER_PART, num_rows // PARTS_PER_JOB))


@dataclass
class Generation:
    """One run of the data set. ``is_draining``: it was asked to stop early, and ends without what is not finished."""

    config: GenerateJobConfig
    folder: JobFolder
    fields: dict[str, Any]
    console: Console
    log: JobLog
    generator: type[Generator] | None = None
    is_draining: bool = field(default=False, init=False)
    _hurry: threading.Timer | None = field(default=None, init=False)
    _totals: dict[str, Any] = field(default_factory=lambda: {"engines": 0}, init=False)

    @cached_property
    def reports(self) -> Reports:
        return Reports(str(self.folder.scratch / "reports"))

    @property
    def _drain_request(self) -> DrainRequest:
        return DrainRequest(str(self.folder.scratch / "drain"))

    def _totals_so_far(self) -> dict[str, Any]:
        """The actors' totals, as they were before where a store does not answer: it may do so the next time."""
        with suppress(OSError):
            self._totals = self.reports.totals()
        return self._totals

    def run(self, todo: StoragePath, num_left: int, *, num_rows: int, spare_errors: int | None) -> dict[str, Any]:
        """Generate the rows in ``todo`` and commit them. Returns facts about the engines and their work.

        Args:
            todo: folder of the rows left to do, ``num_left`` of the job's ``num_rows``.
            spare_errors: rows that may still be rejected; with one more the job drains. None for any number.
        """
        start = time.perf_counter()
        is_verbose, log_format = self.config.verbose, self.config.log_format
        done = num_rows - num_left
        with connected(self.config.address, is_verbose=is_verbose, log_format=log_format):
            self.log.event("job started", output=str(self.folder.path), rows=done, total_rows=num_rows)
            display = display_for(
                self.console, total=num_rows, done=done, log=self._log_progress if log_format == "json" else None
            )
            progress = JobProgress(display, total=num_rows, done=done, read=self._totals_so_far)
            with quiet_ray(is_verbose=is_verbose), sigterm_calls(self._on_sigterm), self._errors_watched(spare_errors):
                dataset, sink = self._plan(todo, num_left)
                try:
                    with progress:
                        dataset.write_datasink(sink)
                except Exception as error:  # Ray wraps what happened in a worker in errors of many kinds
                    explained = _explained(error, self.reports.failure())
                    self.log.error("job failed", error=str(explained))
                    raise explained from error
                finally:
                    if self._hurry is not None:
                        self._hurry.cancel()
        return self._facts(time.perf_counter() - start)

    def _log_progress(self, text: str, facts: dict[str, Any]) -> None:
        self.log.event("progress" if facts else text, **facts)

    def _on_sigterm(self) -> None:
        if self.is_draining:
            terminate()
        self._drain(self.config.drain_seconds)

    def _drain(self, seconds: float) -> None:
        """Have rows in progress finished and written within ``seconds``, and the rest left for another run."""
        self.is_draining = True
        self._drain_request.make(seconds)
        self._hurry = threading.Timer(seconds + WRITE_SECONDS, _thread.interrupt_main)
        self._hurry.daemon = True
        self._hurry.start()

    @contextmanager
    def _errors_watched(self, spare_errors: int | None) -> Iterator[None]:
        if spare_errors is None:
            yield
            return
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(ERROR_POLL_SECONDS):
                if self._totals_so_far().get("errors", 0) > spare_errors:
                    self._drain(0.0)
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _facts(self, wall_seconds: float) -> dict[str, Any]:
        totals, counters = self.reports.totals(), self.reports.counters()
        seconds = totals["seconds"]
        return {
            "engine": self.reports.engine_facts(),
            "final_exits": self.reports.final_exits(),
            "drift": self.reports.drift(),
            "actors": self.reports.processes(),
            "counters": counters,
            "prefix_hit_rate": prefix_hit_rate(counters),
            "num_actors": self.config.num_actors,
            "max_actors": self.config.most_actors,
            "num_actors_run": self.reports.num_actors(),
            "wall_seconds": round(wall_seconds, 3),
            "generation_seconds": round(seconds, 3),
            "started_rows": totals["started"],
            "generated_rows": totals["rows"],
            "generated_tokens": totals["tokens"],
            "tokens_per_second": round(totals["tokens"] / seconds, 1) if seconds else 0.0,
        }

    def _plan(self, todo: StoragePath, num_left: int) -> tuple[Any, Any]:
        import ray

        from tide_ray.data.actor import Generator
        from tide_ray.data.processor import Processor
        from tide_ray.data.sink import ParquetSink

        config = self.config
        batch_size = rows_per_batch(config, num_left)
        drain_path = self._drain_request.path
        options = generator_options(
            config,
            job=job_id(self.fields),
            ledger_folder=str(self.folder.scratch / "running"),
            reports_folder=self.reports.folder,
            drain_path=drain_path,
        )
        processor = Processor(
            processor_config(config, batch_size=batch_size),
            options=options,
            num_rows=num_left,
            generator=self.generator or Generator,
        )
        sink = ParquetSink(
            str(self.folder.path),
            scratch=str(self.folder.scratch),
            attempt=self.folder.attempt,
            rows_per_part=config.rows_per_part or default_rows_per_part(num_left, batch_size),
            facts={**self.fields, "model": config.model},
            late_facts=self.reports.engine_facts,
        )
        files = [{"file": str(path)} for path in snapshot_files(todo)]
        rows = ray.data.from_items(files, override_num_blocks=len(files)).map_batches(
            partial(todo_rows, drain_path=drain_path), batch_format="pyarrow", batch_size=None
        )
        return processor(rows), sink


def processor_config(config: GenerateJobConfig, *, batch_size: int) -> TideProcessorConfig:
    """The job's model and actors."""
    from tide_ray.data.processor import TideProcessorConfig

    return TideProcessorConfig(
        model_source=config.model,
        engine_kwargs=dataclasses.asdict(config.engine_config()),
        batch_size=batch_size,
        concurrency=(config.num_actors, config.most_actors),
        accelerator_type=config.accelerator_type,
        labels=config.labels,
        should_continue_on_error=True,
        num_gpus_per_actor=config.num_gpus_per_actor,
        num_cpus_per_actor=config.num_cpus_per_actor,
        wait_for_nodes_s=config.wait_for_nodes,
    )


def generator_options(
    config: GenerateJobConfig,
    *,
    job: str | None = None,
    ledger_folder: str | None = None,
    reports_folder: str | None = None,
    drain_path: str | None = None,
) -> GeneratorOptions:
    """How the job's rows become requests, what names the job, and where actors and job meet."""
    from tide_ray.data.actor import GeneratorOptions

    return GeneratorOptions(
        wraps_strings=not config.raw,
        system_prompt=config.system_prompt,
        returns_given_prompt=True,
        optional_columns=optional_columns(config),
        shadow=_shadow(config),
        continues_on_error=True,
        step_timeout=config.step_timeout,
        job=job,
        ledger_folder=ledger_folder,
        reports_folder=reports_folder,
        drain_path=drain_path,
    )


def _shadow(config: GenerateJobConfig) -> ShadowOptions | None:
    """How actors watch for drift, or None. Each has a test of its own; as many as there may be keep to one delta."""
    if config.shadow is None or config.max_disagreement is None or config.exits is None:
        return None
    from tide_ray.data.shadow import ShadowOptions

    certificate = pick(read_certificates(config.exits), config.max_disagreement, config.certified_loss)
    return ShadowOptions(share=config.shadow, seed=config.seed or 0, delta=certificate.delta / config.most_actors)


_CAUSE = re.compile(r"(?!ray\.)(\w+\.)*\w*(Error|Exception): \S")
"""How a traceback names an error that is not one of Ray's own."""


def _explained(error: Exception, failure: tuple[str, bool] | None) -> Exception:
    """What an actor reported before the job failed, else what Ray's words begin with, in one line.

    Ray's text holds the tracebacks of all processes that an error came through, the first cause first, and ends with
    advice.
    """
    if failure is not None:
        message, is_user_error = failure
        return UserError(message) if is_user_error else JobError(f"the engine failed: {' '.join(message.split())}")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if _CAUSE.match(line)]
    if causes:
        return JobError(causes[0][:500])
    return JobError(f"{type(error).__name__}: {(lines or [''])[-1][:500]}")
