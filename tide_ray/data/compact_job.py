"""``tide-ray compact``: merges the parts of a finished job that is as it should be."""

from __future__ import annotations

from tide_ray.data.compact import compact_parts
from tide_ray.data.job_folder import JobFolder
from tide_ray.data.lock import locked
from tide_ray.data.storage import StoragePath
from tide_ray.data.verify import verify_job
from tide_ray.types import JobError, UserError


def compact_job(output: str | StoragePath, *, file_bytes: int) -> dict[str, tuple[int, int]]:
    """Verify the job in ``output``, then merge its parts into files of about ``file_bytes``.

    Returns:
        For ``data`` and ``errors``, where there are any, the number of parts before and after.

    Raises:
        UserError: there is no job, it is not finished, or another process is at it.
        JobError: the output is not what the job wrote; nothing is changed.
    """
    folder = JobFolder.existing(output)
    with locked(folder.path, folder.attempt) as lease:
        try:
            folder.begin()
            folder.remove_late_parts()
            if folder.finished() is None:
                raise UserError(f"output: the job in {str(output)!r} is not finished")
            if problems := verify_job(output).problems:
                raise JobError(f"output: {problems[0]} ({len(problems)} problems, see tide-ray verify)")
            return compact_parts(folder.path, name=folder.attempt, file_bytes=file_bytes)
        except OSError as error:
            raise JobError(f"output: cannot write {str(output)!r}: {error}") from error
        finally:
            if lease.is_held:
                folder.clear_uncommitted()
