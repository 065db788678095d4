"""Options made from the fields of configurations, and values that come as text."""

from __future__ import annotations

import re
from typing import Any

import typer
from pydantic import BaseModel

from tide_ray.types import UserError

REPEAT = "; may be given several times"
COMMAS = ", separated by commas"
LABELS = ", NAME=VALUE" + COMMAS


def flag(config: type[BaseModel], field: str, hint: str = "") -> Any:
    """An option for a field of a job's configuration, with the field's own description and default in its help."""
    info = config.model_fields[field]
    default = info.get_default(call_default_factory=True)
    shown = "" if default in (None, [], {}) or isinstance(default, bool) else f" [{default}]"
    return typer.Option(help=f"{info.description}{hint}{shown}")


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def number(name: str, text: str) -> int:
    if not text.isdigit():
        raise UserError(f"{name} must be layer numbers separated by commas, got {text!r}")
    return int(text)


def labels(text: str) -> dict[str, str]:
    """``NAME=VALUE`` separated by commas; those in ``in(A, B)`` separate nothing."""
    found = {}
    for part in re.split(r",(?![^(]*\))", text):
        name, separator, value = part.partition("=")
        if not separator:
            raise UserError(f"labels must be NAME=VALUE separated by commas, got {part.strip()!r}")
        found[name.strip()] = value.strip()
    return found


def number_or_share(name: str, text: str) -> int | float:
    """A whole number, or a share as a fraction or in percent."""
    try:
        return int(text) if text.strip().isdigit() else share(name, text.rstrip("%")) / (100 if "%" in text else 1)
    except UserError:
        raise UserError(f"{name} must be a number of rows or a share like 0.05 or 5%, got {text!r}") from None


def share(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{name} must be numbers separated by commas, got {text!r}") from None
