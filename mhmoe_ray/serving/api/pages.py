"""The web pages of a server. The shared style of page.css and functions of page.js are inserted into each page."""

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from mhmoe_ray.spec import ServeSpec

SHARED_FILES = {"/* page.css */": "page.css", "// page.js": "page.js"}
"""Shared files by the line of a page that is replaced by the content of the file."""
PAGE_TOKENS = 64
"""Maximum number of tokens of an answer that a decoder's page proposes; the server's limit if that is less."""


def page_router(package: str, spec: ServeSpec) -> APIRouter:
    """Return a router with the route GET /, which answers with the file page.html of a package."""
    routes = APIRouter()
    text = _read(package, "page.html").replace("PAGE_TOKENS", str(min(PAGE_TOKENS, spec.max_tokens)))
    for line, shared_file in SHARED_FILES.items():
        text = text.replace(line, _read(__package__, shared_file))
    headers = {"Content-Security-Policy": _content_security_policy(text), "X-Content-Type-Options": "nosniff"}

    @routes.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers=headers)

    return routes


def _read(package: str, file: str) -> str:
    return files(package).joinpath(file).read_text("utf-8")


def _content_security_policy(page: str) -> str:
    """Return a policy that allows only the page's own script and style, by hash, and connections to this server."""

    def tag_hash(tag: str) -> str:
        [content] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    sources = f"script-src 'sha256-{tag_hash('script')}'; style-src 'sha256-{tag_hash('style')}'; connect-src 'self'"
    return f"default-src 'none'; {sources}; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
