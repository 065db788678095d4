"""The page at ``/`` in a real browser."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect

from browsing import watched
from serving import EXITING, KEY, MODEL, Running, running
from tide_ray.serve.model_server import ModelServer


def generate(page: Page, model: str, tokens: int, prompt: str = "Once upon") -> None:
    page.select_option("#model", model)
    page.fill("#prompt", prompt)
    page.fill("#tokens", str(tokens))
    page.click("#go")


def test_an_answer_streams_in_with_every_token_coloured_by_its_depth(live: Running, page: Page, tmp_path: Path) -> None:
    asked, said = watched(page)
    page.goto(live.url)
    page.fill("#key", KEY)
    page.dispatch_event("#key", "change")
    expect(page.locator("#model option")).to_have_count(2)
    said.clear()  # the list of models is asked for once before there is a key
    generate(page, EXITING, 40)
    expect(page.locator("#stop")).to_be_disabled()
    spans = page.locator("#answer span")
    depths = [int(span.get_attribute("data-depth") or 0) for span in spans.all()]
    with live.client() as client:
        whole = client.chat.completions.create(
            model=EXITING, temperature=0, max_tokens=40, messages=[{"role": "user", "content": "Once upon"}]
        )
    choice = whole.choices[0]
    assert page.locator("#answer").text_content() == choice.message.content
    assert depths == choice.tide["exit_layers"]
    assert set(depths) == {2, 4}, "tokens of both depths are to be seen"
    seen = "token => getComputedStyle(token).backgroundColor"
    colours = {depth: spans.nth(depths.index(depth)).evaluate(seen) for depth in (2, 4)}
    assert colours[4] == "rgba(0, 0, 0, 0)"
    assert re.fullmatch(r"rgba\(\d+, \d+, \d+, 0\.\d+\)", colours[2])
    mean = sum(depths) / len(depths)
    expect(page.locator("#depth")).to_have_text(f"{mean:.2f} / 4")
    expect(page.locator("#count")).to_have_text(str(len(depths)))
    assert float(page.locator("#rate").text_content() or 0) > 0
    assert page.locator("#legend").text_content() == f"depth 2: {depths.count(2)}full depth 4: {depths.count(4)}"
    assert said == []
    assert all(url.startswith(live.url) or url.startswith("data:") for url in asked)
    page.screenshot(path=tmp_path / "page.png", full_page=True)


def test_text_is_shown_as_it_is_and_never_run(live: Running, page: Page) -> None:
    page.goto(live.url)
    page.fill("#key", KEY)
    page.dispatch_event("#key", "change")
    expect(page.locator("#model option")).to_have_count(2)

    def answer(route: Any) -> None:
        text = "<img src=x onerror=document.title='run'>"
        chunk = f'{{"choices":[{{"tide":{{"exit_layers":[4],"tokens":["{text}"]}}}}]}}'
        route.fulfill(content_type="text/event-stream", body=f"data: {chunk}\n\ndata: [DONE]\n\n")

    page.route("**/v1/chat/completions", answer)
    generate(page, MODEL, 5)
    expect(page.locator("#answer")).to_contain_text("<img src=x")
    assert page.locator("#answer img").count() == 0
    assert page.title() == "tide_ray"


def test_a_running_answer_can_be_stopped_and_frees_its_place(
    make_model: Callable[..., ModelServer], page: Page
) -> None:
    model = make_model(engine={"max_model_len": 250})
    with running({MODEL: model}, with_keys=False) as server:
        page.goto(server.url)
        expect(page.locator("#model option")).to_have_count(1)
        step = model.engine.engine.step

        def slow_step() -> object:
            time.sleep(0.05)
            return step()

        model.engine.engine.step = slow_step  # type: ignore[method-assign]
        generate(page, MODEL, 200)
        expect(page.locator("#answer span").first).to_be_attached()
        page.click("#stop")
        expect(page.locator("#go")).to_be_enabled()
        server.wait_until_idle()
        assert page.locator("#answer span").count() < 200
        assert page.locator("#error").text_content() == ""


def test_what_goes_wrong_is_told(live: Running, page: Page) -> None:
    page.goto(live.url)
    expect(page.locator("#error")).to_contain_text("No API key provided")
    page.fill("#key", KEY)
    page.dispatch_event("#key", "change")
    expect(page.locator("#error")).to_have_text("")
    generate(page, MODEL, 100_000)
    expect(page.locator("#error")).to_contain_text("max_tokens must be at most")
    expect(page.locator("#go")).to_be_enabled()
