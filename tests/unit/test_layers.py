"""Imports point downward: a package knows those below it, never those above or beside it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {"tide_ray": ROOT / "tide_ray", "tide_kernels": ROOT / "kernels"}
OURS = {*PACKAGES, "jobs", *(file.stem for file in (ROOT / "jobs").glob("*.py"))}

LAYERS = (
    ("tide_ray.cli",),
    ("tide_ray.analytics", "tide_ray.serve", "tide_ray.doctor"),
    ("tide_ray.calibrate",),
    ("tide_ray.data",),
    ("tide_ray.engine",),
    ("tide_ray.exits",),
    ("tide_ray.models",),
    ("tide_ray.config", "tide_ray.pages"),
    ("tide_ray.files",),
    ("tide_ray.types", "tide_ray.messages", "tide_ray.startup"),
    ("tide_kernels",),
)
"""From the top. Those of one layer do not import each other. ``jobs`` may import anything; nothing imports it."""

EXCEPTIONS = {
    ("tide_ray.data.shadow", "tide_ray.calibrate.drift"): "a job judges its own rows as certification judges prompts",
    **{
        ("tide_ray", name): "the names of the top package, for type checkers; they load on first use"
        for name in ("tide_ray.config", "tide_ray.data.processor", "tide_ray.engine.engine", "tide_ray.types")
    },
    ("tide_ray", "tide_ray.startup"): "that is how they load",
    ("tide_ray.cli", "tide_ray"): "the version",
}
"""Importing module, imported one, and the reason."""


def modules() -> dict[str, Path]:
    """Every module by name."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in folder.rglob("*.py"):
            parts = (package, *file.relative_to(folder).with_suffix("").parts)
            found[".".join(part for part in parts if part != "__init__")] = file
    return found


def imports() -> Iterator[tuple[str, str]]:
    """Who imports whom, in functions and for type checkers too."""
    known = modules()
    for name, file in known.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: imports name the whole module"
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [one if one in known else str(node.module) for one in inner]
            elif isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                continue
            yield from ((name, target) for target in targets if target.partition(".")[0] in OURS)


def package_of(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "tide_kernels" else ".".join(parts[:2])


def test_imports_point_downward() -> None:
    level = {package: -number for number, layer in enumerate(LAYERS) for package in layer}
    found = set(imports())
    # Nothing was overlooked: one at the top of a module, one in a function, one for type checkers.
    assert ("tide_ray.engine.engine", "tide_kernels.paged_attention") in found
    assert ("tide_ray.cli.analytics", "tide_ray.analytics.report") in found
    assert ("tide_ray.analytics.dataset", "tide_ray.analytics.object_files") in found

    across = {(a, b) for a, b in found if package_of(a) != package_of(b)} - EXCEPTIONS.keys()
    unknown = {one for pair in across for one in map(package_of, pair)} - level.keys()
    assert not unknown, "which layer are they in?"
    upward = sorted((a, b) for a, b in across if level[package_of(a)] <= level[package_of(b)])
    assert not upward
    assert EXCEPTIONS.keys() <= found, "an exception that is not needed any more"
