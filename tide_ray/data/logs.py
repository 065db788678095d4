"""Structured logs: a JSON object a line, by Ray's own formatter, so that driver and actors write alike.

Every record has Ray's ids (job, node, worker, actor) and ``job``, which is the same for all attempts at one output
folder. No record has a prompt or an answer.
"""

from __future__ import annotations

import logging
from typing import Any


def ray_options(log_format: str) -> dict[str, Any]:
    """What ``ray.init`` gets for it."""
    if log_format == "text":
        return {}
    import ray

    return {
        "logging_config": ray.LoggingConfig(encoding="JSON", log_level="INFO", additional_log_standard_attrs=["name"])
    }


class JobLog:
    """Records of one job. With the format ``text`` nobody listens to them: what there is to say is printed.

    Args:
        logger: of the module whose events they are.
    """

    def __init__(self, logger: logging.Logger, job: str) -> None:
        self._logger = logger
        self._facts = {"job": job}

    def event(self, message: str, **facts: Any) -> None:
        self._logger.info(message, extra={**self._facts, **facts})

    def warning(self, message: str, **facts: Any) -> None:
        self._logger.warning(message, extra={**self._facts, **facts})

    def error(self, message: str, **facts: Any) -> None:
        self._logger.error(message, extra={**self._facts, **facts})
