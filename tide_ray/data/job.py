"""The generation job: snapshot, lock, fingerprint, what is left, Ray, and the facts of the run.

Everything that a user can get wrong is checked before Ray starts. What is committed stays, whatever happens after.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tide_ray.data.cluster import connected, quiet_ray
from tide_ray.data.job_config import GenerateJobConfig
from tide_ray.data.job_folder import JobError, JobFolder
from tide_ray.data.lock import locked
from tide_ray.data.logs import JobLog
from tide_ray.data.progress import JobProgress, display_for
from tide_ray.data.reports import Reports
from tide_ray.data.run_facts import job_fields, job_id, prefix_hit_rate, print_summary, software_versions
from tide_ray.data.schema import optional_columns
from tide_ray.data.snapshot import Snapshot, write_snapshot
from tide_ray.exits.certificates import pick
from tide_ray.exits.checkpoint import read_certificates
from tide_ray.types import UserError

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_ROW_ERRORS = 3
EXIT_INTERRUPTED = 130

logger = logging.getLogger(__name__)
MAX_ROWS_PER_PART = 4096
PARTS_PER_JOB = 50


def run_generate(config: GenerateJobConfig, console: Console | None = None) -> int:
    """Run the job in ``config.output`` from where it stands.

    Returns:
        The exit code: 0, 3 when rows were rejected (they are in ``errors/``) and that is not to be overlooked, 130 when
        interrupted.

    Raises:
        UserError: something in ``config`` cannot be used.
        JobError: the job stopped; committed rows stay, and the same call goes on from there.
    """
    config.sampling_params()
    config.engine_config()
    _check_certified(config)
    folder = JobFolder(config.output)
    folder.create()
    with locked(folder.path):
        folder.begin()
        try:
            console = console or Console(stderr=True, quiet=config.log_format == "json")
            code = _run_locked(config, folder, console)
            return EXIT_OK if code == EXIT_ROW_ERRORS and config.rejected_rows_ok else code
        finally:
            folder.clear_uncommitted()


def _check_certified(config: GenerateJobConfig) -> None:
    """Refuse a job that its checkpoint's certificate does not hold for. Rows' own parameters are checked as they run.

    Raises:
        UserError: naming the setting.
    """
    if config.max_disagreement is None or config.exits is None:
        return
    certificate = pick(read_certificates(config.exits), config.max_disagreement, config.certified_loss)
    certificate.check_request(config.sampling_params())
    if config.shadow is not None and certificate.loss == "task":
        raise UserError("shadow: the certified loss must be tokens or answers, got 'task'")
    for name, value in (("kv_policy", config.kv_policy), ("dtype", config.dtype)):
        if value not in (None, "auto", certified := certificate.fingerprint[name]):
            raise UserError(f"{name}: max_disagreement is certified for {certified!r} only, got {value!r}")


def default_rows_per_part(num_rows: int, batch_size: int) -> int:
    """Small enough that an interrupted job loses little, large enough that a big one does not drown in files."""
    return max(batch_size, min(MAX_ROWS_PER_PART, num_rows // PARTS_PER_JOB))


def _run_locked(config: GenerateJobConfig, folder: JobFolder, console: Console) -> int:
    from tide_ray.data.identity import model_identity

    snapshot = write_snapshot(config, folder.new_input_folder)
    identity = model_identity(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    fields = job_fields(config, identity, snapshot)
    folder.adopt(fields)
    if counts := folder.finished():
        console.print(f"{folder.path} is finished: {counts['rows']} rows, {counts['errors']} errors; nothing to do")
        return EXIT_ROW_ERRORS if counts["errors"] else EXIT_OK
    committed = folder.committed()
    num_before = len(committed.ids)
    if num_before:
        console.print(f"resuming: {num_before} of {snapshot.num_rows} rows are already in {folder.path}")
    folder.write_bad_rows(committed, fields)
    todo, num_left = folder.write_todo(committed)
    facts: dict[str, Any] = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "rows_before": num_before}
    log = JobLog(logger, job_id(fields))
    if num_left:
        try:
            facts |= _Generation(config, folder, snapshot, fields, console, log).run(todo, num_left)
        except KeyboardInterrupt:
            num_done = len(folder.committed().ids)
            log.warning("job stopped", rows=num_done, total_rows=snapshot.num_rows)
            done = f"{num_done} of {snapshot.num_rows} rows"
            console.print(f"stopped: {done} are in {folder.path}; the same command goes on from there")
            return EXIT_INTERRUPTED
    counts = folder.check_complete(snapshot)
    run = {
        "job": job_id(fields),
        **fields,
        "model": config.model,
        "versions": software_versions(),
        "sources": snapshot.sources,
        **facts,
    }
    folder.finish({**run, **counts, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}, counts)
    log.event("job finished", output=str(folder.path), **counts)
    print_summary(console, folder.path, {**facts, **counts})
    return EXIT_ROW_ERRORS if counts["errors"] else EXIT_OK


@dataclass(frozen=True, slots=True)
class _Generation:
    """The part of the job that needs Ray."""

    config: GenerateJobConfig
    folder: JobFolder
    snapshot: Snapshot
    fields: dict[str, Any]
    console: Console
    log: JobLog

    @property
    def reports(self) -> Reports:
        return Reports(str(self.folder.scratch / "reports"))

    def run(self, todo: Path, num_left: int) -> dict[str, Any]:
        """Generate the rows in ``todo`` and commit them. Returns facts about the engines and their work."""
        start = time.perf_counter()
        is_verbose, log_format = self.config.verbose, self.config.log_format
        total, done = self.snapshot.num_rows, self.snapshot.num_rows - num_left
        with connected(self.config.address, is_verbose=is_verbose, log_format=log_format):
            self.log.event("job started", output=str(self.folder.path), rows=done, total_rows=total)
            display = display_for(
                self.console, total=total, done=done, log=self._log_progress if log_format == "json" else None
            )
            progress = JobProgress(display, total=total, done=done, read=self.reports.totals)
            with quiet_ray(is_verbose=is_verbose):
                dataset, sink = self._plan(todo, num_left)
                try:
                    with progress:
                        dataset.write_datasink(sink)
                except Exception as error:  # Ray wraps what happened in a worker in errors of many kinds
                    explained = _explained(error, self.reports.failure())
                    self.log.error("job failed", error=str(explained))
                    raise explained from error
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
            "wall_seconds": round(time.perf_counter() - start, 3),
            "generation_seconds": round(seconds, 3),
            "generated_rows": totals["rows"],
            "generated_tokens": totals["tokens"],
            "tokens_per_second": round(totals["tokens"] / seconds, 1) if seconds else 0.0,
        }

    def _log_progress(self, text: str, facts: dict[str, Any]) -> None:
        self.log.event("progress" if facts else text, **facts)

    def _shadow(self) -> Any:
        """How actors watch for drift, or None. Each has a test of its own, together they keep to one delta."""
        from tide_ray.data.shadow import ShadowOptions

        config = self.config
        if config.shadow is None or config.max_disagreement is None or config.exits is None:
            return None
        certificate = pick(read_certificates(config.exits), config.max_disagreement, config.certified_loss)
        return ShadowOptions(share=config.shadow, seed=config.seed or 0, delta=certificate.delta / config.num_actors)

    def _plan(self, todo: Path, num_left: int) -> tuple[Any, Any]:
        import ray

        from tide_ray.data.actor import GeneratorOptions
        from tide_ray.data.processor import Processor, TideProcessorConfig
        from tide_ray.data.sink import ParquetSink

        config = self.config
        # Few rows must still reach every actor, whichever of them is up first.
        batch_size = min(config.batch_size, -(-num_left // config.num_actors))
        num_batches = -(-num_left // batch_size)
        processor = Processor(
            TideProcessorConfig(
                model_source=config.model,
                engine_kwargs=dataclasses.asdict(config.engine_config()),
                batch_size=batch_size,
                concurrency=config.num_actors,
                should_continue_on_error=True,
                num_gpus_per_actor=config.num_gpus_per_actor,
                num_cpus_per_actor=config.num_cpus_per_actor,
                wait_for_nodes_s=config.wait_for_nodes,
            ),
            options=GeneratorOptions(
                wraps_strings=not config.raw,
                system_prompt=config.system_prompt,
                returns_given_prompt=True,
                optional_columns=optional_columns(config),
                shadow=self._shadow(),
                continues_on_error=True,
                ledger_folder=str(self.folder.scratch / "running"),
                reports_folder=self.reports.folder,
                job=job_id(self.fields),
            ),
            max_batches_per_actor=-(-num_batches // config.num_actors),
        )
        sink = ParquetSink(
            str(self.folder.path),
            scratch=str(self.folder.scratch),
            attempt=self.folder.attempt,
            rows_per_part=config.rows_per_part or default_rows_per_part(num_left, batch_size),
            facts={**self.fields, "model": config.model},
            late_facts=self.reports.engine_facts,
        )
        return processor(ray.data.read_parquet(str(todo))), sink


def _explained(error: Exception, failure: tuple[str, bool] | None) -> Exception:
    """What an actor reported before the job failed, else Ray's own words, in one line."""
    if failure is not None:
        message, is_user_error = failure
        return UserError(message) if is_user_error else JobError(f"the engine failed: {' '.join(message.split())}")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return JobError(f"{type(error).__name__}: {(lines or [''])[-1][:500]}")
