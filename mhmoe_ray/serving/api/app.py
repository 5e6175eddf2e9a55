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

from mhmoe_ray.serving.answer import Answerer, ServedText
from mhmoe_ray.serving.api import completions, embeddings
from mhmoe_ray.serving.api.access import AccessControl, BodySizeLimit, LocalRateLimiter, RateLimiter
from mhmoe_ray.serving.api.errors import HANDLERS, RESPONSES
from mhmoe_ray.serving.api.metrics import render_exposition
from mhmoe_ray.serving.api.schema import (
    DetokenizeRequest,
    DetokenizeResponse,
    Model,
    ModelList,
    StatsResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from mhmoe_ray.serving.api.service import ModelService, Service
from mhmoe_ray.serving.encoder.answer import EncoderAnswerer
from mhmoe_ray.serving.engine import EngineError
from mhmoe_ray.spec import ServeSpec


def page_router(file: str) -> APIRouter:
    """Return a router with the route GET /, the web page in a file of this package."""
    routes = APIRouter()
    text = files(__package__).joinpath(file).read_text("utf-8")
    headers = {"Content-Security-Policy": _content_security_policy(text), "X-Content-Type-Options": "nosniff"}

    @routes.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers=headers)

    return routes


def _content_security_policy(page: str) -> str:
    """Return the page's Content-Security-Policy.

    It allows the page's own script and style, by their hashes, and connections to this server.
    """

    def tag_hash(tag: str) -> str:
        [content] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    sources = f"script-src 'sha256-{tag_hash('script')}'; style-src 'sha256-{tag_hash('style')}'; connect-src 'self'"
    return f"default-src 'none'; {sources}; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"


StatsCollector = Callable[[], Awaitable[list[dict[str, Any]]]]


def create_app(
    answerer: Answerer | EncoderAnswerer,
    model: str,
    spec: ServeSpec,
    replica: str = "",
    collect_stats: StatsCollector | None = None,
    rate_limiter: RateLimiter | None = None,
) -> FastAPI:
    """Return the HTTP application with all routes, which answers with one engine.

    Args:
        answerer: engine and tokenizer, shared by all requests.
        model: the model's name for clients.
        spec: limits and API keys.
        replica: name of this process among the replicas that serve the same model.
        collect_stats: returns the result of `replica_stats` for each replica; by default there is only this one.
        rate_limiter: rate limiter over all replicas; by default limits are counted in this process.
    """
    access = AccessControl(spec.keys, rate_limiter or LocalRateLimiter(spec.keys))
    app = FastAPI(title="mhmoe-ray", exception_handlers=HANDLERS)
    app.add_middleware(BodySizeLimit, max_bytes=spec.max_body_bytes)
    service: ModelService[EncoderAnswerer] | Service
    if isinstance(answerer, EncoderAnswerer):
        service = ModelService(answerer, model, spec, access)
        for router in embeddings.encoder_routers(service):
            app.include_router(router, responses=RESPONSES)
        app.include_router(page_router("pictures.html"))
    else:
        service = Service(answerer, model, spec, access)
        app.include_router(completions.completions_router(service), responses=RESPONSES)
        app.include_router(page_router("page.html"))
        app.include_router(completions.chat_router(service), responses=RESPONSES)
    app.include_router(
        _info_router(service, replica, collect_stats),
        dependencies=[Depends(service.access.authenticate)],
        responses=RESPONSES,
    )

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Return status ok as long as the server is alive."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: RESPONSES[503]})
    async def ready() -> dict[str, str]:
        """Return status ok if the engine can answer, and a 503 if it is broken."""
        if failure_reason := answerer.engine.failure_reason:
            raise EngineError(failure_reason)
        return {"status": "ok"}

    app.openapi_schema = _describe_api(app)
    return app


def _describe_api(app: FastAPI) -> dict[str, Any]:
    """Return the API's description in the OpenAPI format, without FastAPI's own kind of validation error."""
    # FastAPI declares a 422 for invalid requests, but this server answers them with a 400.
    description = app.openapi()
    for path in description["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for schema_name in ("HTTPValidationError", "ValidationError"):
        description["components"]["schemas"].pop(schema_name, None)
    return description


def replica_stats(answerer: ServedText, replica: str) -> dict[str, Any]:
    """Return the statistics of a replica's engine as a JSON object."""
    return {"replica": replica, **answerer.engine.stats().as_json()}


def _info_router(
    service: ModelService[EncoderAnswerer] | Service, replica: str, collect_stats: StatsCollector | None
) -> APIRouter:
    """Return a router with the routes for models, tokenizing and statistics.

    Args:
        service: the served model.
        replica: name of this process among the replicas.
        collect_stats: returns the statistics of all replicas; None if there is only this one.
    """
    routes, answerer = APIRouter(), service.answerer

    @routes.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[await model(service.model)])

    @routes.get("/v1/models/{name}")
    async def model(name: str) -> Model:
        service.check_model(name)
        length = answerer.engine.seq_len
        return Model(id=service.model, created=service.start_time, max_model_len=length, details=answerer.details)

    @routes.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> TokenizeResponse:
        service.check_model(request.model)
        token_ids = await service.encode(request.prompt)
        token_ids = token_ids if request.add_special_tokens else token_ids[1:]
        return TokenizeResponse(tokens=token_ids, count=len(token_ids), max_model_len=answerer.engine.seq_len)

    @routes.post("/detokenize")
    async def detokenize(request: DetokenizeRequest) -> DetokenizeResponse:
        service.check_model(request.model)
        return DetokenizeResponse(prompt=await service.decode(request.tokens))

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        """Return the tokens that start and end a document, and the chat template, for clients that count tokens."""
        start_text, end_text = answerer.boundary_texts
        template = answerer.template.text if answerer.template else None
        return TokenizerInfo(bos_token=start_text, eos_token=end_text, chat_template=template)

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return the statistics of this replica in Prometheus' format."""
        text = render_exposition(answerer.engine.stats(), {"model": service.model, "replica": replica})
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @routes.get("/stats")
    async def stats() -> StatsResponse:
        """Return the statistics of all replicas."""
        stats_list = await collect_stats() if collect_stats else [replica_stats(answerer, replica)]
        return StatsResponse(model=service.model, replicas=stats_list)

    return routes
