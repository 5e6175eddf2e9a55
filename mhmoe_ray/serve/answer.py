"""Text in, text out: an engine's answer, decoded as it comes, with stop strings and what clients read of tokens."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple, Self

from pydantic import BaseModel
from tokenizers import Tokenizer

from mhmoe_ray.data.tokenizer import boundaries, token_count
from mhmoe_ray.errors import ServeError
from mhmoe_ray.planner.sizes import sizes
from mhmoe_ray.serve.chat_template import ChatTemplate
from mhmoe_ray.serve.detokenizer import TextDecoder, TextStream, TokenBytes
from mhmoe_ray.serve.engine import Engine, FinishReason, Request, Scored
from mhmoe_ray.spec import ModelSpec


def edge_texts(tokenizer: Tokenizer) -> tuple[str, str]:
    """The token that starts a document, and one that ends it."""
    edges = boundaries(tokenizer)
    begin, end = (tokenizer.id_to_token(token) for token in (edges.start, max(edges.ends)))
    assert begin is not None
    assert end is not None
    return begin, end


class ScoredText(NamedTuple):
    """A token as what it stands for."""

    part: bytes
    """Of a text in UTF-8; maybe no whole characters."""
    characters: int
    """Of it in the answer's text, if they are whole: none of a special token, and no space in front that the decoder
    drops."""
    logprob: float | None
    alternatives: list[tuple[bytes, float]]


class Piece(NamedTuple):
    text: str
    """The next part of the answer; empty while nothing more is certain."""
    tokens: int
    """Tokens of the answer so far."""
    scores: tuple[ScoredText, ...] = ()
    """Of tokens that came since the last piece, where asked for."""
    finish_reason: FinishReason | None = None
    """Set on the last piece only: the end of a document or a stop string, or a limit on tokens."""


class ModelDetails(BaseModel):
    """What people want to know of a model before they ask it."""

    checkpoint: str
    """The run's id and the checkpoint's name."""
    parameters: int
    active_parameters: int
    """That one token uses at most."""
    layers: int
    experts: int
    """Routed experts in each layer that has any; 0 for a dense model."""
    top_k: int
    heads: int
    """Sub-tokens per token; 1 for a plain mixture of experts."""

    @classmethod
    def of(cls, checkpoint: str, model: ModelSpec) -> Self:
        count, moe = sizes(model), model.moe
        return cls(
            checkpoint=checkpoint,
            parameters=count.parameters,
            active_parameters=count.active_parameters,
            layers=model.layers,
            experts=moe.experts if moe else 0,
            top_k=moe.top_k if moe else 0,
            heads=moe.heads if moe else 1,
        )


class Answerer:
    """An engine and the tokenizer of its model."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate | None, details: ModelDetails
    ) -> None:
        """Args:
        engine: computes.
        tokenizer: with tokens for the edges of a document.
        template: of conversations, where the model knows such.
        details: of the model.
        """
        self.engine, self.tokenizer, self.template, self.details = engine, tokenizer, template, details
        self.start = boundaries(tokenizer).start
        self.tokens = token_count(tokenizer)
        """Ids are below it."""
        self.edges = edge_texts(tokenizer)
        self.decode = TextDecoder(tokenizer)
        self._bytes = TokenBytes(tokenizer, self.decode)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt as the start of a document."""
        return [self.start, *self._ids(prompt)]

    def encode_chat(self, template: ChatTemplate, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, which the next answer follows; templates may put the document's start in front
        themselves.

        Raises:
            ServeError: the template does not take these messages.
        """
        ids = self._ids(template.prompt(messages))
        return ids if ids[:1] == [self.start] else [self.start, *ids]

    def _ids(self, text: str) -> list[int]:
        """As a batch of one: of these alone the library lets other threads run meanwhile."""
        [encoding] = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)

    def check_length(self, prompt_ids: Sequence[int], answer: bool) -> None:
        """Whether prompt and, if there is to be one, the first token of an answer fit in the model.

        Raises:
            ServeError: they do not.
        """
        if len(prompt_ids) + answer > self.engine.seq_len:
            why = f"it has {len(prompt_ids)} tokens, and prompt and answer together may have {self.engine.seq_len}"
            raise ServeError("the prompt", why, "shorten it")

    async def answer(
        self, request: Request, stops: Sequence[str] = (), echo: bool = False, own: int = 0
    ) -> AsyncGenerator[Piece]:
        """One piece per token, and a last one with the reason why it ends. To close it ends the work.

        Args:
            request: to the engine.
            stops: the answer ends before the first of these strings.
            echo: whether the text begins with that of the prompt.
            own: tokens at the prompt's start that were not the client's, and that it is told nothing of.

        Raises:
            BusyError, EngineError: as `Engine.generate`.
        """
        stream = TextStream(self.decode, stops, request.prompt_ids)
        count, opening = 0, self.decode(request.prompt_ids) if echo else ""
        async with aclosing(self.engine.generate(request)) as updates:
            async for update in updates:
                scores: list[ScoredText] = []
                if request.logprobs is not None:
                    scores += self._scored(update.prompt[own:], True)
                    scores += self._scored(update.tokens, stream.at_start)
                text, opening = opening, ""
                for scored in update.tokens:
                    count += 1
                    text += stream.push(scored.token)
                if stream.stopped:
                    yield Piece(text, count, tuple(scores), "stop")
                    return
                if update.finish:
                    text += stream.finish()
                    reason: FinishReason = "stop" if stream.stopped else update.finish
                    yield Piece(text, count, tuple(scores), reason)
                    return
                yield Piece(text, count, tuple(scores))

    def _scored(self, row: Sequence[Scored], at_start: bool) -> Iterator[ScoredText]:
        """`at_start`: no token with a text comes before these."""
        for token, logprob, alternatives in row:
            part, special = self._bytes[token], token in self.decode.special
            text = self.decode([token]) if at_start or special else part.decode("utf-8", "replace")
            at_start &= special
            tops = [(self._bytes[other], logprob) for other, logprob in alternatives]
            yield ScoredText(part, len(text), logprob, tops)
