"""The page at /: a box for a prompt, and the answer as it comes."""

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse


def page_router() -> APIRouter:
    routes = APIRouter()
    text = files(__package__).joinpath("page.html").read_text("utf-8")
    headers = {"Content-Security-Policy": _policy(text), "X-Content-Type-Options": "nosniff"}

    @routes.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers=headers)

    return routes


def _policy(page: str) -> str:
    """Its own script and style, by their hashes, this server, and nothing else."""

    def hashed(tag: str) -> str:
        [inside] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()

    sources = f"script-src 'sha256-{hashed('script')}'; style-src 'sha256-{hashed('style')}'; connect-src 'self'"
    return f"default-src 'none'; {sources}; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
