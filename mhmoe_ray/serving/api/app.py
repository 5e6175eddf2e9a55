"""The HTTP server: a FastAPI application around one engine, with web pages at / and /chat.

Ray Serve runs it; nothing here depends on Ray.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mhmoe_ray import __version__
from mhmoe_ray.serving.answer import ServedModel, ServedText
from mhmoe_ray.serving.api.access import (
    HELD_BODIES,
    IMAGE_BODY_BYTES,
    MIN_HELD_BYTES,
    TEXT_BODY_BYTES,
    AccessControl,
    BodyLimits,
    LocalRateLimiter,
    RateLimiter,
)
from mhmoe_ray.serving.api.errors import HANDLERS, RESPONSES
from mhmoe_ray.serving.api.metrics import render_exposition
from mhmoe_ray.serving.api.pages import chat_page_router, docs_router, page_router
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
from mhmoe_ray.serving.api.service import ModelService, TextService
from mhmoe_ray.serving.engine import EngineError
from mhmoe_ray.serving.family import serving_of
from mhmoe_ray.spec import ServeSpec


class WeightsHeaders:
    """Middleware that names the served weights in the headers of every response."""

    def __init__(self, app: ASGIApp, headers: Mapping[str, str]) -> None:
        self._app, self._headers = app, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                # An answer of an adapter names it already.
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)


StatsCollector = Callable[[], Awaitable[list[dict[str, Any]]]]


def create_app(
    answerer: ServedModel,
    model: str,
    spec: ServeSpec,
    replica: str = "",
    collect_stats: StatsCollector | None = None,
    rate_limiter: RateLimiter | None = None,
) -> FastAPI:
    """Return the HTTP application with all routes, which answers with one engine.

    `replica` names this process among the replicas of the model. By default statistics are only those of this replica,
    and limits are counted in this process.
    """
    access = AccessControl(spec.keys, rate_limiter or LocalRateLimiter(spec.keys))
    app = FastAPI(title="mhmoe-ray", version=__version__, docs_url=None, redoc_url=None, exception_handlers=HANDLERS)
    serving = serving_of(answerer.kind)
    max_bytes = spec.max_body_bytes or (IMAGE_BODY_BYTES if serving.reads_images else TEXT_BODY_BYTES)
    max_held_bytes = max(MIN_HELD_BYTES, HELD_BODIES * max_bytes)
    app.add_middleware(BodyLimits, access=access, max_bytes=max_bytes, max_held_bytes=max_held_bytes)
    weights_headers = answerer.details.weights.headers
    app.add_middleware(WeightsHeaders, headers=weights_headers)
    # The middleware that is added last is the outermost: it answers preflight requests, which have no key, and lets web
    # pages read the refusals of the other.
    if spec.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=spec.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=list(weights_headers),
        )
    service, routers = serving.routers(answerer, model, spec, access)
    for router in routers:
        app.include_router(router, responses=RESPONSES)
    app.include_router(page_router(serving.page_package, spec))
    app.include_router(chat_page_router(answerer))
    info_routers = [_info_router(service, replica, collect_stats)]
    if isinstance(service, TextService):
        info_routers.append(_tokenizer_router(service))
    for router in info_routers:
        app.include_router(router, dependencies=[Depends(service.access.authenticate)], responses=RESPONSES)

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

    app.include_router(docs_router(app.openapi()))
    return app


def replica_stats(answerer: ServedModel, replica: str) -> dict[str, Any]:
    """Return the statistics of a replica's engine as a JSON object."""
    return {"replica": replica, "adapters": sorted(answerer.adapters), **answerer.engine.stats().as_json()}


def _info_router(service: ModelService[Any], replica: str, collect_stats: StatsCollector | None) -> APIRouter:
    routes, answerer = APIRouter(), service.answerer

    @routes.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[await model(name) for name in service.model_names])

    @routes.get("/v1/models/{name}")
    async def model(name: str) -> Model:
        service.check_model(name)
        return Model(
            id=name,
            parent=service.model if service.adapter(name) else None,
            created=service.start_time,
            max_model_len=answerer.engine.seq_len if isinstance(answerer, ServedText) else None,
            details=answerer.details,
        )

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


def _tokenizer_router(service: TextService[Any]) -> APIRouter:
    routes, answerer = APIRouter(), service.answerer

    @routes.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> TokenizeResponse:
        service.check_model(request.model)
        token_ids = await service.encode(request.prompt)
        if not request.add_special_tokens:
            token_ids = token_ids[answerer.count_added(token_ids) :]
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

    return routes
