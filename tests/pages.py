"""Reads report pages: tags, text and figures."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree


class Page(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> list[ElementTree.Element]:
        """The figures, parsed."""
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
        return [ElementTree.fromstring(base64.b64decode(source.partition(",")[2])) for source in sources]

    def check_needs_nothing_else(self) -> None:
        assert not {tag for tag, _ in self.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
        for tag, attributes in self.tags:
            assert not any(name.startswith("on") for name in attributes)
            if tag == "a":
                assert not re.match("[a-z]+:|//", attributes["href"] or "")
        policy = next(a["content"] for t, a in self.tags if t == "meta" and "http-equiv" in a)
        assert (policy or "").startswith("default-src 'none'")


def words(svg: ElementTree.Element) -> str:
    return " ".join("".join(text.itertext()) for text in svg.iter("{http://www.w3.org/2000/svg}text"))
