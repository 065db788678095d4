"""Connecting to Ray, and keeping it quiet: local and private unless an address is given."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tide_ray.data.logs import ray_options
from tide_ray.messages import one_line
from tide_ray.types import UserError

RAY_DATA_LOGGER = "ray.data"
CONNECT_SECONDS = 10.0


@contextmanager
def connected(address: str | None, *, is_verbose: bool = False, log_format: str = "text") -> Iterator[None]:
    """Be connected to Ray for the block; a connection that was there before is used and left open, with its logging.

    ``address`` None takes ``RAY_ADDRESS`` (set inside ``ray job submit``), else starts Ray on this machine.

    Raises:
        UserError: the cluster cannot be reached.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        _prepare_local()
    else:
        _check_reachable(address)
    if not is_verbose:
        # Ray's core prints an error about actor arguments on every run of Ray Data, past all Python logging.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    if ray.is_initialized():
        yield
        return
    level = logging.INFO if is_verbose else logging.ERROR
    with warnings.catch_warnings(), nullcontext() if is_verbose else _stderr_on_failure():
        if not is_verbose:
            warnings.simplefilter("ignore")
        try:
            with _sigterm_handler_kept():
                ray.init(
                    address=address,
                    logging_level=level,
                    log_to_driver=is_verbose,
                    **_options(address),
                    **ray_options(log_format),
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = one_line(error, 300)
            raise UserError(f"address: cannot connect to Ray at {address!r}: {reason}") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def quiet_ray(*, is_verbose: bool) -> Iterator[None]:
    """Without Ray Data's progress bars, messages and memory polling for the block, unless they are asked for."""
    if is_verbose:
        yield
        return
    from ray.data import DataContext

    context = DataContext.get_current()
    quiet = {
        "enable_progress_bars": False,
        "enable_operator_progress_bars": False,
        "print_on_execution_start": False,
        "memory_usage_poll_interval_s": None,  # a thread for every batch in the actor, for a figure nobody sees
    }
    before = {name: getattr(context, name) for name in quiet}
    log = logging.getLogger(RAY_DATA_LOGGER)
    level = log.level
    for name, value in quiet.items():
        setattr(context, name, value)
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)


@contextmanager
def _sigterm_handler_kept() -> Iterator[None]:
    """Ray's own handler ends the process, with all that is in progress; one that was there before stays."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _check_reachable(address: str) -> None:
    """Refuse an address where nobody listens: Ray itself would try it for many minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator:
        if address != "auto":
            raise UserError(f"address must be local, auto, HOST:PORT or ray://HOST:PORT, got {address!r}")
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"address: nobody answers at {address!r}: {error}") from None


def _options(address: str) -> dict[str, Any]:
    """What ray.init refuses for a cluster that runs already."""
    return {"include_dashboard": False} if address == "local" else {}


@contextmanager
def _stderr_on_failure() -> Iterator[None]:
    """Hold back what is written to file descriptor 2 (Ray's core writes there); show it only if the block fails.

    A UserError says all there is to say in its one line.
    """
    kept = os.dup(2)
    with tempfile.TemporaryFile() as hidden:
        os.dup2(hidden.fileno(), 2)
        try:
            yield
        except UserError:
            raise
        except BaseException:
            hidden.seek(0)
            os.write(kept, hidden.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _prepare_local() -> None:
    """A cluster for this process alone: no usage reports, and a token of its own instead of one written to the home.

    Ray reads the variables when it is imported, and a process that imported it earlier has made its own choice.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray starts workers at nice 15, so that they leave its own processes the CPU. Here the work is the engine, and the
    # driver's and the daemons' hundred wake-ups a second would interrupt it each time.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if "ray" in sys.modules or "RAY_AUTH_MODE" in os.environ:
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    is_given = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if not is_given and not (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
