"""What a page in a browser does besides being shown."""

from __future__ import annotations

from playwright.sync_api import Page


def watched(page: Page) -> tuple[list[str], list[str]]:
    """What the page asks for and what its console says, from now on."""
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    return asked, said
