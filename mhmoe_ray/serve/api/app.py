"""The HTTP server: a FastAPI application around one engine, with a web page at /.

Ray Serve runs it; nothing here depends on Ray.
"""

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST

from mhmoe_ray.serve.answer import Answerer
from mhmoe_ray.serve.api import completions
from mhmoe_ray.serve.api.access import Access, Counter, Limits, SmallBodies
from mhmoe_ray.serve.api.errors import HANDLERS, RESPONSES
from mhmoe_ray.serve.api.metrics import exposition
from mhmoe_ray.serve.api.schema import (
    AllStats,
    Detokenized,
    DetokenizeRequest,
    Model,
    ModelList,
    TokenizeRequest,
    TokenizerInfo,
    Tokens,
)
from mhmoe_ray.serve.api.service import Service
from mhmoe_ray.serve.engine import EngineError
from mhmoe_ray.spec import ServeSpec


def page_router() -> APIRouter:
    routes = APIRouter()
    text = files(__package__).joinpath("page.html").read_text("utf-8")
    headers = {"Content-Security-Policy": _policy(text), "X-Content-Type-Options": "nosniff"}

    @routes.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers=headers)

    return routes


def _policy(page: str) -> str:
    """Return the page's Content-Security-Policy: it allows its own script and style, by their hashes, and connections
    to this server, and nothing else."""

    def hashed(tag: str) -> str:
        [inside] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()

    sources = f"script-src 'sha256-{hashed('script')}'; style-src 'sha256-{hashed('style')}'; connect-src 'self'"
    return f"default-src 'none'; {sources}; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"


Everyone = Callable[[], Awaitable[list[dict[str, Any]]]]


def create_app(
    answerer: Answerer,
    model: str,
    spec: ServeSpec,
    replica: str = "",
    everyone: Everyone | None = None,
    limits: Counter | None = None,
) -> FastAPI:
    """Return the application that answers with an engine.

    Args:
        answerer: engine and tokenizer, shared by all requests.
        model: the model's name for clients.
        spec: limits and API keys.
        replica: name of this process among other replicas that serve the same model.
        everyone: returns the result of `told` for each replica; by default there is only this one.
        limits: counter of the keys' limits over all replicas; by default they are counted in this process.
    """
    service = Service(answerer, model, spec, Access(spec.keys, limits or Limits(spec.keys)))
    app = FastAPI(title="mhmoe-ray", exception_handlers=HANDLERS)
    app.add_middleware(SmallBodies, most=spec.max_body_bytes)
    app.include_router(completions.completions_router(service), responses=RESPONSES)
    app.include_router(page_router())
    app.include_router(completions.chat_router(service), responses=RESPONSES)
    app.include_router(
        _others(service, replica, everyone), dependencies=[Depends(service.access.client)], responses=RESPONSES
    )

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The server is alive."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: RESPONSES[503]})
    async def ready() -> dict[str, str]:
        """The engine can answer."""
        if why := answerer.engine.why_broken:
            raise EngineError(why)
        return {"status": "ok"}

    app.openapi_schema = _described(app)
    return app


def _described(app: FastAPI) -> dict[str, Any]:
    """Return the API's description, without the 422 that FastAPI declares: this server answers such requests with
    400."""
    described = app.openapi()
    for path in described["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for unused in ("HTTPValidationError", "ValidationError"):
        described["components"]["schemas"].pop(unused, None)
    return described


def told(answerer: Answerer, replica: str) -> dict[str, Any]:
    """Return the statistics of a replica's engine, as JSON."""
    return {"replica": replica, **answerer.engine.stats().as_json()}


def _others(service: Service, replica: str, everyone: Everyone | None) -> APIRouter:
    routes, answerer = APIRouter(), service.answerer

    @routes.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[await model(service.model)])

    @routes.get("/v1/models/{name}")
    async def model(name: str) -> Model:
        service.check_model(name)
        length = answerer.engine.seq_len
        return Model(id=service.model, created=service.started, max_model_len=length, details=answerer.details)

    @routes.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> Tokens:
        service.check_model(request.model)
        ids = await service.encode(request.prompt)
        ids = ids if request.add_special_tokens else ids[1:]
        return Tokens(tokens=ids, count=len(ids), max_model_len=answerer.engine.seq_len)

    @routes.post("/detokenize")
    async def detokenize(request: DetokenizeRequest) -> Detokenized:
        service.check_model(request.model)
        return Detokenized(prompt=await service.decode(request.tokens))

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        """Tokens that start and end a document, and the chat template, for clients that count tokens themselves."""
        begin, end = answerer.edges
        template = answerer.template.text if answerer.template else None
        return TokenizerInfo(bos_token=begin, eos_token=end, chat_template=template)

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Statistics of this replica, in Prometheus' format."""
        text = exposition(answerer.engine.stats(), {"model": service.model, "replica": replica})
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @routes.get("/stats")
    async def stats() -> AllStats:
        """Statistics of all replicas."""
        found = await everyone() if everyone else [told(answerer, replica)]
        return AllStats(model=service.model, replicas=found)

    return routes
