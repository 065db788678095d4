"""The API reference: every public name says what it is, and the pages build."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tide_ray.reference import PUBLIC_MODULES, public_modules


def public_names() -> Iterator[tuple[str, Any]]:
    """Every module, its functions and classes, and their methods and properties."""
    for module in public_modules():
        yield module.__name__, module
        names = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
        for name in names:
            value = getattr(module, name)
            if not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            if "__all__" not in vars(module) and value.__module__ != module.__name__:
                continue  # only imported there
            yield f"{module.__name__}.{name}", value
            for member, of_class in vars(value).items() if inspect.isclass(value) else ():
                plain = getattr(of_class, "__func__", of_class)
                if not member.startswith("_") and (inspect.isfunction(plain) or isinstance(plain, property)):
                    yield f"{module.__name__}.{name}.{member}", plain


def test_every_public_name_has_a_docstring() -> None:
    names = dict(public_names())
    assert {"tide_ray.TideEngine.generate", "tide_kernels.route.route", "tide_ray.serve.LLMConfig"} <= set(names)
    missing = [name for name, value in names.items() if len((value.__doc__ or "").split()) < 2]
    assert missing == []


def test_no_docstring_is_one_that_python_made() -> None:
    """A dataclass without a docstring gets its signature for one."""
    made = [
        n for n, value in public_names() if inspect.isclass(value) and value.__doc__.startswith(f"{value.__name__}(")
    ]
    assert made == []


def test_functions_that_check_what_they_are_given_say_what_they_raise() -> None:
    silent = [
        name
        for name, value in public_names()
        if inspect.isfunction(value)
        and re.search(r"^\s+raise (UserError|ValueError)\b", inspect.getsource(value), re.MULTILINE)
        and not re.search("[Rr]aise|[Rr]efus", value.__doc__ or "")
    ]
    assert silent == []


@pytest.mark.slow
def test_pages_build_and_have_every_public_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tide_ray.reference", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "does not resolve" not in done.stderr
    pages = {name: tmp_path / "site" / f"{name.replace('.', '/')}.html" for name in PUBLIC_MODULES}
    assert (tmp_path / "site" / "index.html").exists()
    for full, value in public_names():
        module = max((name for name in pages if full == name or full.startswith(f"{name}.")), key=len)
        if full != module:
            assert f'id="{full.removeprefix(module + ".")}"' in pages[module].read_text(), full
        elif value.__doc__:
            assert pages[module].stat().st_size > 1000
