"""Pages of one file each, which need nothing else and no network; names and values are escaped.

A package's own ``templates`` extend ``base.html`` and use the macros of ``parts.html``, which are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from tide_ray.files import appearing


def write_page(file: Path, package: str, template: str, page: Mapping[str, Any]) -> Path:
    """Write ``template`` of ``package``, filled with ``page``. The file appears complete or not at all. Returns it."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader(__package__)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render(**page, version=version("tide-ray"))
    with appearing(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return file
