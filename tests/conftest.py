"""Fixtures shared by all tests: few threads, the demo model's folder, one saved tiny model, and a browser."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tide_ray.models.demo import demo_model_path
from tiny_models import save_tiny_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from object_store import S3Server

os.environ["TOKENIZERS_PARALLELISM"] = "false"
_CLOCK = (time.time, time.monotonic, time.sleep)


def _starts_ray(nodeid: str) -> bool:
    """Tests that start Ray are in folders of this name; one process runs them all."""
    return "/ray/" in nodeid.partition("::")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that start Ray come first: their process is the last to be ready. Of them, files that share
    ``ray_cluster`` come last, so that no other finds it running."""
    sharing = {item.path for item in items if _shares_ray(item)}
    items.sort(key=lambda item: (not _starts_ray(item.nodeid), item.path in sharing))


def _shares_ray(item: pytest.Item) -> bool:
    return "ray_cluster" in getattr(item, "fixturenames", ())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For ``-n 2`` without ``--dist``: a file's tests stay in one process, since they share what they start.

    All that start Ray stay together too: they wait more than they compute, and two clusters at a time would be more
    than two cores can start within Ray's own time limits. (Groups by a mark of xdist's need names that pytest 9.2 does
    not look at.)
    """
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if _starts_ray(nodeid) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False  # xdist would begin with the files of most tests, and Ray's would end late
    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> Iterator[None]:
    """Tiny models get slower with more threads, and parallel test runs share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _the_process_keeps_its_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test may replace a module's ``time``, not what is in it. A server that other tests share runs meanwhile: its
    event loop once looked at a clock that had jumped back to 100 s, and slept for the difference.

    It asks for ``monkeypatch`` to end before that one does."""
    yield
    assert (time.time, time.monotonic, time.sleep) == _CLOCK


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The folder of the demo model; the first use on a machine downloads and converts it."""
    return demo_model_path()


@pytest.fixture(scope="module")
def ray_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """One local Ray, started for the first file that asks for it and ended after the last: they follow each other."""
    import ray

    from ray_start import start_local_ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        if not ray.is_initialized():
            start_local_ray()
        yield
        *_, last = (item.path for item in request.session.items if _shares_ray(item))
        if request.path == last:
            ray.shutdown()


@pytest.fixture(scope="session")
def object_store() -> Iterator[S3Server]:
    """An S3 server; ``bucket`` is the usual way to use it."""
    from object_store import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture
def bucket(object_store: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket, which this process and its children can find."""
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    return object_store.make_bucket()


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer. Shared: copy it before changing it."""
    return save_tiny_model("llama", tmp_path_factory.mktemp("tiny_llama"), with_tokenizer=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The machine's own Chromium: playwright's would have to be downloaded."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium in CI; .ci/run installs it")
        pytest.skip("needs chromium (apt-get install chromium)")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    made = browser.new_page(viewport={"width": 900, "height": 900})
    made.set_default_timeout(20_000)
    yield made
    made.close()
