"""Requests with images: functions and schemas that the routes of encoders and of vision models share."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from mhmoe_ray.families.images.image_urls import RefusedImageError
from mhmoe_ray.serving.api.access import Client
from mhmoe_ray.serving.api.errors import RequestError
from mhmoe_ray.serving.api.schema import StrictRequest
from mhmoe_ray.serving.api.service import ModelService
from mhmoe_ray.serving.api.stream import timeout_error
from mhmoe_ray.serving.engine import EngineError
from mhmoe_ray.serving.engine.round_engine import ClientRequest
from mhmoe_ray.serving.sampling import Text


class RoutesRequest(StrictRequest):
    """A request for the experts that the patches of an image choose."""

    image: Text
    model: str | None = None


@asynccontextmanager
async def image_request(
    service: ModelService[Any], client: Client, param: str | None
) -> AsyncIterator[ClientRequest[Any, Any]]:
    """Count a request of a client, and return a context in which to decode its images and compute its answers.

    When the context ends, the tokens of the request count against the client's rate limit, unless the engine failed
    before it computed any token of an answer. `param` names the field with the image; it is None if the body is the
    image. An unusable image, a used-up rate limit and a timeout are a RequestError, a busy or broken engine BusyError
    or EngineError.
    """
    await service.begin_request(client)
    try:
        async with asyncio.timeout(service.spec.request_timeout):
            with service.answerer.engine.admission(client.name) as request:
                is_failed = False
                try:
                    yield request
                except EngineError:
                    is_failed = True
                    raise
                finally:
                    # The tokens also count if the client leaves early, because it has used them. They do not count if
                    # the engine fails before it computes any token of an answer.
                    if request.answer_tokens or not is_failed:
                        client.record_tokens(request.input_tokens + request.answer_tokens)
    except TimeoutError as e:
        raise timeout_error(service.spec.request_timeout) from e
    except RefusedImageError as e:
        raise RequestError(400, f"{repr(param) if param else 'the body'}: {e}", param, "invalid_image") from e
