"""What an installed tide-ray promises: a light import, its own kernels package, and every file in the wheel."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import tide_ray
from tide_ray.startup import quick_imports

ROOT = Path(__file__).parents[2]
HEAVY = ("datasets", "numpy", "pyarrow", "ray", "tokenizers", "torch", "transformers")


def run_python(code: str, cwd: Path) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, check=True, capture_output=True, text=True).stdout


def test_importing_tide_ray_and_its_params_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import json, sys, tide_ray\n"
        "tide_ray.SamplingParams(), tide_ray.EngineConfig(), tide_ray.UserError\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    assert json.loads(run_python(code, tmp_path)) == []


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        # A configuration brings torch with it, but a model's code, which takes as long again, is for the actors.
        ("import tide_ray.data.job, tide_ray.data.processor, tide_ray.data.identity, tide_ray.serve.run\n"
         "from transformers import LlamaConfig\n"
         "from tide_ray.models.supported import check_supported\n"
         "check_supported(LlamaConfig())",
         ["tide_ray.engine.engine", "tide_ray.models.adapter", "transformers.modeling_utils", "numba"]),
        ("import tide_ray.serve.deployment", ["torch", "transformers", "numba"]),  # of which each front is one process
    ],
)  # fmt: skip
def test_who_runs_no_model_does_not_import_what_does(code: str, unwanted: list[str], tmp_path: Path) -> None:
    found = run_python(f"{code}\nimport sys\nprint([name for name in {unwanted!r} if name in sys.modules])", tmp_path)
    assert found.strip() == "[]"


def test_imports_collect_nothing_and_the_collector_goes_on_after_them() -> None:
    def failing_import() -> None:
        with quick_imports():
            assert not gc.isenabled()
            import_module("tide_ray.no_such_module")

    assert gc.isenabled()
    with pytest.raises(ModuleNotFoundError):
        failing_import()
    assert gc.isenabled()
    with quick_imports():
        with quick_imports():
            pass
        assert not gc.isenabled(), "the other block goes on"
    assert gc.isenabled()
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled(), "who had turned it off wants it off"
    finally:
        gc.enable()


def test_a_command_ends_without_a_last_collection(tmp_path: Path) -> None:
    code = (
        "import atexit, gc\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 1000))\n"  # the last to be called
        "from tide_ray.cli import main\n"
        "main(['--version'])"
    )
    assert run_python(code, tmp_path).split() == [tide_ray.__version__, "True"]


@pytest.mark.parametrize("name", tide_ray.__all__)
def test_every_exported_name_can_be_imported(name: str) -> None:
    assert getattr(tide_ray, name) is not None
    assert name in dir(tide_ray)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tide_ray' has no attribute 'TideEngin'"):
        tide_ray.TideEngin  # noqa: B018


def test_the_version_is_the_distributions() -> None:
    assert tide_ray.__version__ == importlib.metadata.version("tide-ray")


def test_tide_kernels_is_importable_away_from_the_checkout(tmp_path: Path) -> None:
    code = "import tide_kernels, os; print(os.path.isfile(os.path.join(list(tide_kernels.__path__)[0], 'py.typed')))"
    assert run_python(code, tmp_path).strip() == "True"


def test_the_kernels_folder_does_not_shadow_the_huggingface_distribution(tmp_path: Path) -> None:
    """A regular package `kernels` later on the path wins over our folder, as that has no __init__.py."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("name = 'HuggingFace'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.name)"
    assert run_python(code, ROOT).strip() == "HuggingFace"


def test_the_wheel_lists_every_package_of_the_checkout() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent for path in (ROOT / "tide_ray").rglob("*.py")}
    kernel_folders = {path.parent for path in (ROOT / "kernels").rglob("*.py")} | {ROOT / "kernels"}
    present = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    present |= {".".join(("tide_kernels", *folder.relative_to(ROOT / "kernels").parts)) for folder in kernel_folders}
    assert listed == present


def test_the_wheel_has_every_file_that_is_no_code() -> None:
    globs = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["tide_ray"]
    package = ROOT / "tide_ray"
    listed = {path for glob in globs for path in package.glob(glob)}
    present = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert listed == present


@pytest.mark.parametrize("package", ["tide_ray", "tide_kernels"])
def test_the_packages_ship_their_types(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert any((Path(folder) / "py.typed").exists() for folder in spec.submodule_search_locations or ())
