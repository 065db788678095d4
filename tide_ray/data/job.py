"""The generation job: snapshot, lock, fingerprint, what is left, Ray, and the facts of the run.

Everything that a user can get wrong is checked before Ray starts. What is committed stays, whatever happens after.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tide_ray.data.drain import TerminatedError, sigterm_calls, terminate
from tide_ray.data.dry_run import run_dry
from tide_ray.data.generation import Generation
from tide_ray.data.job_config import GenerateJobConfig
from tide_ray.data.job_folder import DifferentJobError, JobFolder
from tide_ray.data.lock import Lease, locked
from tide_ray.data.logs import JobLog
from tide_ray.data.run_facts import job_fields, job_id, print_summary, software_versions
from tide_ray.data.snapshot import write_snapshot
from tide_ray.data.storage import StoragePath, absolute, storage_path
from tide_ray.exits.certificates import pick
from tide_ray.exits.checkpoint_files import read_certificates
from tide_ray.types import JobError, UserError

if TYPE_CHECKING:
    from tide_ray.data.actor import Generator

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_ROW_ERRORS = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

logger = logging.getLogger(__name__)


def run_generate(
    config: GenerateJobConfig, console: Console | None = None, *, generator: type[Generator] | None = None
) -> int:
    """Run the job in ``config.output`` from where it stands.

    Args:
        console: what is told goes there; default: standard error.
        generator: a class in place of ``actor.Generator``.

    Returns:
        The exit code: 0, 3 when rows were rejected (they are in ``errors/``) and that is not to be overlooked, 130 when
        interrupted, 143 when SIGTERM stopped it.

    Raises:
        UserError: something in ``config`` cannot be used.
        JobError: the job stopped; committed rows stay, and the same call goes on from there.
    """
    config.sampling_params()
    config.engine_config()
    _check_certified(config)
    console = console or Console(stderr=True, quiet=config.log_format == "json")
    if config.dry_run:
        return run_dry(config, console)
    try:
        with sigterm_calls(terminate):
            for path in _outputs(config):
                folder = JobFolder(path)
                folder.create()
                try:
                    with _owned(folder) as lease:
                        code = _run_owned(config, folder, lease, console, generator)
                    return EXIT_OK if code == EXIT_ROW_ERRORS and config.rejected_rows_ok else code
                except DifferentJobError:
                    if not config.force_new_run:
                        raise
    except TerminatedError:
        console.print("stopped by SIGTERM; the same command goes on from what is committed")
        return EXIT_TERMINATED
    raise AssertionError("there is always another folder name")


def _check_certified(config: GenerateJobConfig) -> None:
    """Refuse a job that its checkpoint's certificate does not hold for. Rows' own parameters are checked as they run.

    Raises:
        UserError: naming the setting.
    """
    if config.max_disagreement is None or config.exits is None:
        return
    certificate = pick(read_certificates(config.exits), config.max_disagreement, config.certified_loss)
    certificate.check_request(config.sampling_params())
    for name, value in (("kv_policy", config.kv_policy), ("dtype", config.dtype)):
        if value not in (None, "auto", certified := certificate.fingerprint[name]):
            raise UserError(f"{name}: max_disagreement is certified for {certified!r} only, got {value!r}")


def _outputs(config: GenerateJobConfig) -> Iterator[StoragePath]:
    """The output folder, then the ones beside it that a new run of another job may use."""
    path = absolute(storage_path(config.output, "output"))
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}")


@contextmanager
def _owned(folder: JobFolder) -> Iterator[Lease]:
    """Own the folder for the block; what goes wrong with writing into it is a JobError."""
    try:
        with locked(folder.path, folder.attempt) as lease:
            try:
                folder.begin()
                yield lease
            except (KeyboardInterrupt, JobError, OSError):
                if not lease.is_held:
                    raise JobError(f"output: {str(folder.path)!r} was taken over by another attempt") from None
                raise
            finally:
                if lease.is_held:
                    folder.clear_uncommitted()
    except OSError as error:
        raise JobError(f"output: cannot write {str(folder.path)!r}: {error}") from error


def _run_owned(
    config: GenerateJobConfig, folder: JobFolder, lease: Lease, console: Console, generator: type[Generator] | None
) -> int:
    from tide_ray.data.identity import model_identity

    snapshot = write_snapshot(config, folder.new_input_folder)
    identity = model_identity(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    fields = job_fields(config, identity, snapshot)
    folder.adopt(fields)
    _remove_late_parts(folder, console)
    if folder.path != next(_outputs(config)):
        console.print(f"{config.output} belongs to a different job; this one is in {folder.path}")
    if config.retry_errors and (num_retried := folder.take_back_errors()):
        console.print(f"trying {num_retried} rejected rows again")
    if counts := folder.finished():
        console.print(f"{folder.path} is finished: {counts['rows']} rows, {counts['errors']} errors; nothing to do")
        return EXIT_ROW_ERRORS if counts["errors"] else EXIT_OK
    committed = folder.committed()
    num_before = committed.num_ids
    if num_before:
        console.print(f"resuming: {num_before} of {snapshot.num_rows} rows are already in {folder.path}")
    folder.write_bad_rows(committed, fields)
    most_errors = config.most_errors(snapshot.num_rows)
    _check_errors(folder, len(committed.errors), most_errors)
    todo, num_left = folder.write_todo(committed, sorts_by_length=config.length_column is not None)
    facts: dict[str, Any] = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "rows_before": num_before}
    log = JobLog(logger, job_id(fields))
    generation = Generation(config, folder, fields, console, log, generator)
    if num_left:
        spare_errors = None if most_errors is None else most_errors - len(committed.errors)
        try:
            facts |= generation.run(todo, num_left, num_rows=snapshot.num_rows, spare_errors=spare_errors)
        except KeyboardInterrupt:
            if not lease.is_held:
                raise
            if not generation.is_draining:
                return _stopped(folder, snapshot.num_rows, console, log, EXIT_INTERRUPTED)
    _remove_late_parts(folder, console)
    committed = folder.committed()
    _check_errors(folder, len(committed.errors), most_errors)
    if generation.is_draining and committed.num_ids < snapshot.num_rows:
        return _stopped(folder, snapshot.num_rows, console, log, EXIT_TERMINATED)
    counts = folder.check_complete(snapshot, committed)
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


def _remove_late_parts(folder: JobFolder, console: Console) -> None:
    if names := folder.remove_late_parts():
        console.print(f"removed {len(names)} parts that came after their attempt was over: {', '.join(names)}")


def _check_errors(folder: JobFolder, num_errors: int, most_errors: int | None) -> None:
    if most_errors is not None and num_errors > most_errors:
        raise JobError(
            f"max_errors: {num_errors} rows are rejected, more than the {most_errors} allowed; the reasons are in "
            f"{folder.path / 'errors'}, --retry-errors tries them again"
        )


def _stopped(folder: JobFolder, num_rows: int, console: Console, log: JobLog, code: int) -> int:
    num_done = folder.committed().num_ids
    log.warning("job stopped", rows=num_done, total_rows=num_rows)
    done = f"{num_done} of {num_rows} rows"
    console.print(f"stopped: {done} are in {folder.path}; the same command goes on from there")
    return code
