"""The report's page in a real browser, on a desk and on a phone."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page

from analytics_helpers import make_rows, write_output
from browsing import watched
from tide_ray.analytics import load
from tide_ray.analytics.report import make_report, write_report

TOO_WIDE = """() => [...document.body.querySelectorAll("*")]
    .filter(one => !one.closest(".scroll table") && !one.closest("details:not([open])"))
    .filter(one => one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
    .map(one => one.tagName + "." + one.className + ": " + one.textContent.slice(0, 40))"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    rows = make_rows(40)
    rows[0]["prompt"] = "w" * 3000
    for row in rows:
        row["row_id"] += "-" + "f" * 32
    error = {"row_id": "f" * 64, "stage": "generate", "error": "no space" * 30, "attempts": 1, "input": "x"}
    facts = {
        "engine": {
            "num_layers": 4, "max_num_seqs": 8, "exits": {"boundaries": [2, 3], "mode": "exits"}, "dtype": "float32",
            "device": "cpu", "stages": [{"name": f"stage_{n}", "layers": [n], "depth": n} for n in range(4)],
        },
        "num_actors": 1,
    }  # fmt: skip
    model = str(tiny_llama_folder)
    first = write_output(folder / "first", rows, model=model, kept=("kind",), errors=[error], run=facts)
    second = write_output(folder / "second-with-a-long-name", make_rows(40, seed=1), model=model, run=facts)
    with load([first, second]) as analytics:
        return write_report(folder / "page.html", make_report(analytics))


@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_is_wider_than_the_screen_and_nothing_is_asked_for(
    page: Page, file: Path, width: int, tmp_path: Path
) -> None:
    asked, said = watched(page)
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(file.as_uri())
    assert page.evaluate(TOO_WIDE) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for details in page.locator("details").all():
        details.locator("summary").click()
    assert page.evaluate(TOO_WIDE) == []
    images = page.locator("img")
    assert images.count() >= 10
    assert images.evaluate_all("all => all.every(one => one.complete && one.naturalWidth > 0)")
    # A figure's text is drawn at 13 pixels when it is 499 pixels (5.2 inches) wide.
    assert min(images.evaluate_all("all => all.map(one => one.clientWidth)")) / 499 * 13 >= 8
    assert page.locator(".answer span[style]").count() > 20
    assert asked[0] == file.as_uri()
    assert all(url.startswith("data:") for url in asked[1:])
    assert said == []
    page.screenshot(path=tmp_path / "page.png", full_page=True)
