"""The dashboard at `/`: one page that shows the status, live, from nothing but this process.

The page is a file beside this one, with its style and script inside. It asks ``/status`` again and again and writes
what it finds as text. The header ``Content-Security-Policy`` allows these two by their hashes, requests to this
address, and nothing else: no other file or server, no markup made of strings (``require-trusted-types-for``), no frame.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from importlib.resources import files

from fastapi import APIRouter, Response


def dashboard_routes(*, token_set: bool) -> APIRouter:
    """The page. ``token_set`` says whether there is a token, with which it offers to change circuits."""
    router = APIRouter(include_in_schema=False)
    text = (files(__package__) / "dashboard.html").read_text(encoding="utf-8")
    page = text.replace('data-token="none"', f'data-token="{"set" if token_set else "none"}"').encode()
    headers = {
        "Content-Security-Policy": _policy(text),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @router.head("/")
    @router.get("/")
    async def dashboard() -> Response:
        return Response(page, headers=headers, media_type="text/html")

    return router


def _policy(text: str) -> str:
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(text, 'script')}",
            f"style-src {_hash(text, 'style')}",
            "img-src data:",  # the empty icon, without which browsers ask for one
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hash(text: str, element: str) -> str:
    (content,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
    return f"'sha256-{b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
