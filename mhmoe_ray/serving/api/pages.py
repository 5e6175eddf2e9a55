"""The web pages of a server. The shared style of page.css and functions of page.js are inserted into each page."""

import base64
import hashlib
import json
import re
from html import escape
from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from mhmoe_ray.serving.answer import ServedModel, ServedText
from mhmoe_ray.serving.api.errors import RequestError
from mhmoe_ray.spec import ServeSpec

SHARED_FILES = {"/* page.css */": "page.css", "// page.js": "page.js"}
"""Shared files by the line of a page that is replaced by the content of the file."""
PAGE_TOKENS = 64
"""Maximum number of tokens of an answer that a decoder's page proposes; the server's limit if that is less."""


def page_router(package: str, spec: ServeSpec) -> APIRouter:
    """Return a router with the route GET /, which answers with the file page.html of a package."""
    text = _page(package, "page.html").replace("PAGE_TOKENS", str(min(PAGE_TOKENS, spec.max_tokens)))
    return _text_router("/", text.replace("PAGE_PATH", ""))


def chat_page_router(model: ServedModel) -> APIRouter:
    """Return a router with the route GET /chat: the page of a conversation, or a 404 without a chat template."""
    text = _page(__package__, "chat.html").replace("PAGE_PATH", r"\/chat")
    template = model.template if isinstance(model, ServedText) else None
    return _text_router("/chat", text, None if template else "this model has no chat template, so it has no chat page")


def _page(package: str, file: str) -> str:
    text = _read(package, file)
    for line, shared_file in SHARED_FILES.items():
        text = text.replace(line, _read(__package__, shared_file))
    return text


def docs_router(description: dict[str, Any]) -> APIRouter:
    """Return a router with the route GET /docs, which shows the API's description in tables, without any script."""
    title = f"mhmoe-ray {description['info']['version']}"
    tables = {title: [["route", "request", "answer"]]}
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            bodies = operation.get("requestBody", {}), operation["responses"]["200"]
            tables[title].append([f"{method.upper()} {path}", *map(_type, bodies)])
    for name, schema in description["components"]["schemas"].items():
        tables[name] = [["field", "type", "default", ""]]
        for field, value in schema.get("properties", {}).items():
            default = json.dumps(value["default"]) if "default" in value else "required"
            tables[name].append([field, _type(value), default, value.get("description", "")])
    page = f"<!doctype html><title>{title}</title><style>{_read(__package__, 'page.css')}</style>"
    for name, rows in tables.items():
        lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}' for cell in row)}" for row in rows)
        page += f"<h2>{name}</h2><table>{lines}</table>"
    return _text_router("/docs", page)


def _type(schema: dict[str, Any]) -> str:
    """Return the type of a JSON schema, or of a body with several media types, in words and with its limits."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if options := schema.get("anyOf") or [content.get("schema", {}) for content in schema.get("content", {}).values()]:
        return " or ".join(dict.fromkeys(name for option in options for name in _type(option).split(" or ")))
    if "enum" in schema or "const" in schema:
        return " or ".join(map(json.dumps, schema.get("enum", [schema.get("const")])))
    limits = [f" {key} {value}" for key, value in schema.items() if key.startswith(("min", "max", "exclusive"))]
    items = f" of {_type(schema['items'])}" if "items" in schema else ""
    return f"{schema.get('type', '')}{items}{','.join(limits)}"


def _text_router(path: str, page: str, refusal: str | None = None) -> APIRouter:
    routes = APIRouter()
    headers = {"Content-Security-Policy": _content_security_policy(page), "X-Content-Type-Options": "nosniff"}

    @routes.get(path, include_in_schema=False)
    async def text() -> HTMLResponse:
        if refusal:
            raise RequestError(404, refusal, code="no_chat_template")
        return HTMLResponse(page, headers=headers)

    return routes


def _read(package: str, file: str) -> str:
    return files(package).joinpath(file).read_text("utf-8")


def _content_security_policy(page: str) -> str:
    """Return a policy that allows only the page's own script and style, by hash, and connections to this server."""
    sources = "".join(
        f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'; "
        for tag, content in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL)
    )
    other_sources = "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
    return f"default-src 'none'; {sources}{other_sources}"
