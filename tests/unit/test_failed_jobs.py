"""What a failed job says in its one line."""

from __future__ import annotations

import traceback

from tide_ray.data.generation import _explained
from tide_ray.types import JobError, UserError

ADVICE = "To change retry attempts, backoff, or which errors are retried, configure `ray.data.DataContext`."


def raised() -> str:
    """The text of an error that came through two processes, as Ray Data prints it."""
    try:
        try:
            raise OSError(28, "No space left on device", "out/data/.tmp/part-1")
        except OSError as error:
            raise RuntimeError("UDF failed to process a data block.") from error
    except RuntimeError:
        text = traceback.format_exc().replace("RuntimeError:", "ray.exceptions.UserCodeException:")
        return f"ray::MapWorker.submit() (pid=7)\n{text}\n{ADVICE}"


def test_the_first_cause_is_named_and_not_rays_advice() -> None:
    """A full disk was told as "To change retry attempts ...": the last line of what Ray says."""
    explained = _explained(Exception(raised()), None)
    assert isinstance(explained, JobError)
    assert str(explained) == "OSError: [Errno 28] No space left on device: 'out/data/.tmp/part-1'"


def test_what_an_actor_reported_comes_first_and_words_without_a_cause_are_kept() -> None:
    assert str(_explained(Exception(raised()), ("no such depth", True))) == "no such depth"
    assert isinstance(_explained(Exception(raised()), ("no such depth", True)), UserError)
    assert str(_explained(ValueError("the node\nis gone"), None)) == "ValueError: is gone"
