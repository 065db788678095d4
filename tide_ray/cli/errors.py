"""Exit codes of the command line, and how errors become them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from tide_ray.messages import one_line
from tide_ray.types import JobError, UserError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


@contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """A line on stderr and an exit code for what a user got wrong, for a job that failed, and for Ctrl-C.

    So for a file that cannot be read or written: a disk, a file server or an object store that fails as it is used.
    """
    try:
        yield
    except UserError as error:
        fail(error, EXIT_USAGE)
    except JobError as error:
        fail(error, EXIT_FAILED)
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        fail(f"{str(error.filename)!r}: {error.strerror}", EXIT_FAILED)
    except KeyboardInterrupt:
        fail("interrupted", EXIT_INTERRUPTED)


def fail(error: object, code: int) -> NoReturn:
    """Print the error in one line and end with this exit code."""
    typer.echo(f"error: {one_line(error)}", err=True)
    raise typer.Exit(code)
