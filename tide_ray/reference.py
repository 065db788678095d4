"""``python -m tide_ray.reference FOLDER``: the API reference as static pages, built by pdoc from docstrings.

What is public is said here and nowhere else.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

PUBLIC_MODULES = (
    "tide_ray",
    "tide_ray.analytics",
    "tide_ray.calibrate.certify",
    "tide_ray.calibrate.config",
    "tide_ray.calibrate.job",
    "tide_ray.data.compact_job",
    "tide_ray.data.job",
    "tide_ray.data.job_config",
    "tide_ray.data.processor",
    "tide_ray.data.status",
    "tide_ray.data.verify",
    "tide_ray.engine.async_engine",
    "tide_ray.exits.certificates",
    "tide_ray.exits.checkpoint",
    "tide_ray.exits.policies",
    "tide_ray.serve",
    "tide_ray.types",
    "tide_kernels.compact",
    "tide_kernels.decoder_layer",
    "tide_kernels.exit_project",
    "tide_kernels.gpu",
    "tide_kernels.kv_write",
    "tide_kernels.paged_attention",
    "tide_kernels.rms_norm",
    "tide_kernels.rotary",
    "tide_kernels.route",
    "tide_kernels.sample",
    "tide_kernels.silu_mul",
    "tide_kernels.tiled_linear",
)


def public_modules() -> list[ModuleType]:
    """The modules of the reference, imported, with all names of their ``__all__``, of which some load on first use."""
    modules = [import_module(name) for name in PUBLIC_MODULES]
    for module in modules:
        for name in getattr(module, "__all__", ()):
            getattr(module, name)
    return modules


def write_reference(folder: str | Path) -> list[Path]:
    """Write a page for each public module, and ``index.html``, into ``folder``, which is made. Returns the pages.

    Raises:
        ModuleNotFoundError: pdoc is not installed (``pip install tide-ray[docs]``).
    """
    import pdoc

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(*(module.__name__ for module in public_modules()), output_directory=folder)
    return [folder / "index.html", *(folder / f"{name.replace('.', '/')}.html" for name in PUBLIC_MODULES)]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tide_ray.reference", description="API reference as static pages")
    parser.add_argument("folder", help="where the pages are written")
    print(write_reference(parser.parse_args(arguments).folder)[0])


if __name__ == "__main__":
    main()
