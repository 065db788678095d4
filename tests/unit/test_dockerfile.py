"""The image: from Ray's of the version that the package is pinned to, with files that there are and no secrets."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster" / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    lines = re.sub(r"\\\n\s*", " ", "\n".join(line for line in TEXT.splitlines() if not line.startswith("#")))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines.splitlines() if line.strip())]


def test_the_base_has_the_ray_and_a_python_that_the_package_wants() -> None:
    (pin,) = [one for one in PROJECT["dependencies"] if one.startswith("ray[")]
    for ray_version, minor in re.findall(r"rayproject/ray:([\d.]+)-py3(\d+)-", TEXT):
        assert ray_version in SpecifierSet(pin.partition("]")[2])
        assert f"3.{minor}.0" in SpecifierSet(PROJECT["requires-python"])


def test_what_is_copied_is_there_and_is_all_that_an_installation_needs() -> None:
    copied = [part for name, rest in instructions() if name == "COPY" for part in rest.split()[1:-1]]
    assert all((ROOT / path).exists() for path in copied)
    assert set(copied) >= {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "tide_ray", "kernels"}


def test_extras_are_those_of_the_package() -> None:
    for extra in re.findall(r"EXTRAS=\[(\w+)\]", TEXT):
        assert extra in PROJECT["optional-dependencies"]


def test_it_runs_as_rays_user_and_holds_no_secret() -> None:
    assert [rest for name, rest in instructions() if name == "USER"][-1] == "ray"
    assert not re.search(r"(TOKEN|PASSWORD|SECRET|KEY)=", TEXT)
