"""Images and texts in, vectors and captions out: an encoder's engine with the tokenizer of its model."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from mhmoe_ray.data.tokenizer import DocumentEncoder
from mhmoe_ray.errors import ServeError
from mhmoe_ray.families.encoder.serving.request import EncodeRequest
from mhmoe_ray.families.images.crops import crop_pixels
from mhmoe_ray.families.images.image_urls import ImageThread, is_image_url, read_image_url
from mhmoe_ray.serving.answer import ModelDetails, ServedText
from mhmoe_ray.spec import EncoderSpec

if TYPE_CHECKING:
    from mhmoe_ray.families.encoder.serving.engine import EncoderEngine


class EncoderAnswerer(ServedText):
    """Served encoder: its engine, its tokenizer, and the `names` of images that its web page proposes."""

    kind = "encoder"
    engine: "EncoderEngine"

    def __init__(
        self,
        engine: "EncoderEngine",
        tokenizer: Tokenizer,
        details: ModelDetails,
        encoder: EncoderSpec,
        *,
        writes_captions: bool,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__(engine, tokenizer, details)
        self.encoder, self.writes_captions, self.names = encoder, writes_captions, list(names)
        self._document_encoder = DocumentEncoder(tokenizer)
        self._image_thread = ImageThread()

    @property
    def has_vectors(self) -> bool:
        """True if the model has a head for matching images with texts, which computes their vectors."""
        return self.encoder.d_match is not None

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a text as the model reads it, beginning with the start token."""
        # As in training, the start token is the only special token of a text.
        [token_ids] = self._document_encoder.encode([prompt])
        return list(token_ids)

    # Threads decode images and tokenize texts, because large ones take a while and other requests must go on meanwhile.
    async def read_image(self, url: str, max_tokens: int | None = None) -> EncodeRequest:
        """Return the request for an image's caption, or its vector if `max_tokens` is None.

        An image that cannot be used is a RefusedImageError.
        """
        image = await self._image_thread.run(self._read_pixels, url)
        return EncodeRequest(image=image, max_tokens=max_tokens)

    def _read_pixels(self, url: str) -> np.ndarray:
        return crop_pixels(read_image_url(url), self.encoder.image_size)

    async def read_text(self, text: str) -> EncodeRequest:
        """Return the request for the vector of a text; a text longer than the model's longest one is a ServeError."""
        token_ids = await asyncio.to_thread(self.encode, text)
        if len(token_ids) > self.engine.seq_len:
            reason = f"it has {len(token_ids)} tokens with the start token, and the model reads {self.engine.seq_len}"
            raise ServeError("the text", reason, "shorten it")
        return EncodeRequest(token_ids=token_ids)

    async def read(self, value: str) -> EncodeRequest:
        """Return the request for the vector of a text, or of an image in a data URL, with the errors of both."""
        return await (self.read_image(value) if is_image_url(value) else self.read_text(value))
