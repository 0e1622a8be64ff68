"""The page at `/`: one HTML file with its script and style inside, and a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import HTMLResponse

FILE = Path(__file__).with_name("page.html")


@cache
def _page() -> tuple[str, str]:
    """(text of the page, its content security policy)."""
    text = FILE.read_text(encoding="utf-8")
    allowed = {name: " ".join(map(_source, _inline(text, name))) for name in ("script", "style")}
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _inline(text: str, tag: str) -> list[str]:
    return re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)


def _source(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def response() -> HTMLResponse:
    text, policy = _page()
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})
