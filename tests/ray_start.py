"""Checks ``ray start`` command lines with Ray's own command line, without starting anything."""

from __future__ import annotations

import shlex
from typing import Any

from ray.scripts.scripts import start


def check_ray_start(command: str) -> dict[str, Any]:
    """The options of a command line ``ray start ...``. Raises click's errors for an option that there is not."""
    program, verb, *arguments = shlex.split(command)
    assert (program, verb) == ("ray", "start")
    return start.make_context("ray start", arguments).params
