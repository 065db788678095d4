"""The page at ``/``: one file, nothing from elsewhere, and a policy that lets a browser run only what is in it."""

from __future__ import annotations

import base64
import re
from functools import cache
from hashlib import sha256
from importlib.resources import files

from starlette.responses import HTMLResponse, Response


@cache
def _page() -> tuple[str, str]:
    """The page, and its Content-Security-Policy with the hashes of its one script and one style."""
    text = (files("tide_ray.serve") / "page.html").read_text(encoding="utf-8")
    hashes = {}
    for tag in ("script", "style"):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        hashes[tag] = base64.b64encode(sha256(content.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def page_response() -> Response:
    """The page with the headers that keep it alone."""
    text, policy = _page()
    return HTMLResponse(text, headers={"content-security-policy": policy, "x-frame-options": "DENY"})
