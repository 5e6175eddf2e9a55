"""The HTTP server, as a FastAPI application around one engine. Ray Serve runs it; nothing here knows of Ray."""

from fastapi import FastAPI

from mhmoe_ray.serve.answer import Answerer
from mhmoe_ray.serve.http import completions
from mhmoe_ray.serve.http.errors import HANDLERS
from mhmoe_ray.serve.http.schema import Detokenized, DetokenizeRequest, Model, ModelList, TokenizeRequest, Tokens
from mhmoe_ray.serve.http.service import Service


def create_app(answerer: Answerer, model: str, max_tokens: int) -> FastAPI:
    """The application that answers with an engine.

    Args:
        answerer: shared by all requests.
        model: its name for clients.
        max_tokens: the most that a request may ask for.
    """
    app = FastAPI(title="mhmoe-ray", exception_handlers=HANDLERS)
    service = Service(answerer, model, max_tokens)
    app.include_router(completions.router(service))

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The server lives."""
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> ModelList:
        found = Model(id=model, created=service.started, max_model_len=answerer.engine.seq_len)
        return ModelList(data=[found])

    @app.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> Tokens:
        service.check_model(request.model)
        ids = answerer.encode(request.prompt)
        ids = ids if request.add_special_tokens else ids[1:]
        return Tokens(tokens=ids, count=len(ids), max_model_len=answerer.engine.seq_len)

    @app.post("/detokenize")
    async def detokenize(request: DetokenizeRequest) -> Detokenized:
        service.check_model(request.model)
        return Detokenized(prompt=answerer.decode(request.tokens))

    return app
