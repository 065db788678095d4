"""``tide-ray serve``: Ray, Ray Serve and the application, until a signal; then open requests are let end."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from types import FrameType
from typing import Any

from rich.console import Console

from tide_ray.data.cluster import connected
from tide_ray.data.identity import model_identity
from tide_ray.serve.config import LLMServingArgs
from tide_ray.serve.listener import Address
from tide_ray.serve.settings import TLS_FIELDS, ServeSettings
from tide_ray.types import UserError

APPLICATION = "tide_ray"
EXIT_OK = 0
EXIT_FAILED = 1
FLUSH_SECONDS = 0.5
"""The last bytes of answers that have ended are still on their way."""
_USER_ERROR = re.compile(r"UserError: (.+)")


def run_serve(settings: ServeSettings, args: LLMServingArgs, console: Console | None = None) -> int:
    """Serve until SIGINT or SIGTERM; a second signal does not wait for open requests.

    Returns:
        The exit code.

    Raises:
        UserError: something in the settings cannot be used.
    """
    console = console or Console(stderr=True)
    for config in args.llm_configs:
        engine = config.engine_config
        model_identity(config.model_source, revision=engine.revision, trust_remote_code=engine.trust_remote_code)
    address = Address(settings.host, settings.port, **{name: getattr(settings, name) for name in TLS_FIELDS})
    address.check()
    # Nothing here blocks an event loop. Ray Serve's further thread for user code would only take the interpreter from
    # the engine's, several times for each chunk of a stream.
    os.environ.setdefault("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0")
    if not settings.verbose:
        os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    with connected(settings.address, is_verbose=settings.verbose):
        return _serve(settings, args, address, console)


def _serve(settings: ServeSettings, args: LLMServingArgs, address: Address, console: Console) -> int:
    from ray import serve

    from tide_ray.serve.deployment import make_application

    if not settings.verbose:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # which importing it set
    stop = _Signals()
    try:
        serve.start(proxy_location="Disabled")
        try:
            handle = serve.run(make_application(args, address), name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise _reason(error) from None
        names = ", ".join(config.model_id for config in args.llm_configs)
        console.print(f"serving {names} at {settings.url}/v1, page at {settings.url}/; Ctrl-C ends", soft_wrap=True)
        stop.wait()
        _drain(handle, settings.drain_timeout_s, stop, console)
        return EXIT_OK
    finally:
        serve.shutdown()


def _drain(handle: Any, timeout_s: float, stop: _Signals, console: Console) -> None:
    deadline = time.monotonic() + timeout_s
    left = sum(handle.broadcast("drain").results(timeout_s=30))
    if left:
        console.print(f"waiting for {left} open requests; another signal ends them", highlight=False)
    while left and time.monotonic() < deadline and stop.count < 2:
        time.sleep(0.2)
        left = sum(handle.broadcast("drain").results(timeout_s=30))
    time.sleep(FLUSH_SECONDS)


class _Signals:
    """Counts SIGINT and SIGTERM from now on."""

    def __init__(self) -> None:
        self.count = 0
        self._came = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self._came.set()

    def wait(self) -> None:
        while not self._came.wait(1.0):  # a wait without an end would not let signals through
            pass


def _reason(error: RuntimeError) -> Exception:
    """Why the application did not start: what a replica's constructor said of the user's settings, if it did."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    texts = [deployment.message for deployment in application.deployments.values()] if application else []
    found = _USER_ERROR.findall("\n".join([*texts, str(error)]))
    return UserError(found[-1].strip()) if found else error
