"""Text in, text out: decode an engine's answer as it arrives, apply stop strings, and turn token scores into text."""

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
    """Return the texts of the token that starts a document and of one that ends it."""
    edges = boundaries(tokenizer)
    begin, end = (tokenizer.id_to_token(token) for token in (edges.start, max(edges.ends)))
    assert begin is not None
    assert end is not None
    return begin, end


class ScoredText(NamedTuple):
    """The score of a token, with the token as the bytes of its text."""

    part: bytes
    """UTF-8 bytes of the token; they may begin or end in the middle of a character."""
    characters: int
    """Number of characters that the token adds to the answer's text, if it consists of complete characters.

    A special token adds none, and a space at the start that the decoder drops does not count.
    """
    logprob: float | None
    alternatives: list[tuple[bytes, float]]


class Piece(NamedTuple):
    text: str
    """The next part of the answer's text; empty while no more of it is certain."""
    tokens: int
    """Number of tokens of the answer so far."""
    scores: tuple[ScoredText, ...] = ()
    """Scores of the tokens that came since the last piece, if the request asks for them."""
    finish_reason: FinishReason | None = None
    """Set on the last piece only: "stop" at the end of a document or at a stop string, "length" at a limit on
    tokens."""


class ModelDetails(BaseModel):
    """Facts about the served model that its users want to know: name and sizes."""

    checkpoint: str
    """The run's id and the checkpoint's name."""
    parameters: int
    active_parameters: int
    """Largest number of parameters that one token uses."""
    layers: int
    experts: int
    """Number of routed experts in each layer that has any; 0 for a dense model."""
    top_k: int
    heads: int
    """Number of sub-tokens per token; 1 for a plain mixture of experts."""

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
    """An engine together with the tokenizer and the chat template of its model."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate | None, details: ModelDetails
    ) -> None:
        """Combine an engine with what is needed to turn text into tokens and tokens into text.

        Args:
            engine: the engine that computes the answers.
            tokenizer: the model's tokenizer, which has tokens for the start and end of a document.
            template: the chat template; None if the model has none.
            details: facts about the model.
        """
        self.engine, self.tokenizer, self.template, self.details = engine, tokenizer, template, details
        self.start = boundaries(tokenizer).start
        self.tokens = token_count(tokenizer)
        """Number of token ids: every id is below it."""
        self.edges = edge_texts(tokenizer)
        self.decode = TextDecoder(tokenizer)
        self._bytes = TokenBytes(tokenizer, self.decode)

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt as the start of a document."""
        return [self.start, *self._ids(prompt)]

    def encode_chat(self, template: ChatTemplate, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Return the token ids of a conversation, up to where the assistant's next answer begins.

        The token that starts a document is put in front, unless the template has done so itself.

        Raises:
            ServeError: the template does not accept these messages.
        """
        ids = self._ids(template.prompt(messages))
        return ids if ids[:1] == [self.start] else [self.start, *ids]

    def _ids(self, text: str) -> list[int]:
        """Encode the text as a batch of one: only for batches does the library let other threads run meanwhile."""
        [encoding] = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)

    def check_length(self, prompt_ids: Sequence[int], answer: bool) -> None:
        """Check that the prompt fits in the model, together with the first token of an answer if one is wanted.

        Raises:
            ServeError: it does not fit.
        """
        if len(prompt_ids) + answer > self.engine.seq_len:
            why = f"it has {len(prompt_ids)} tokens, and prompt and answer together may have {self.engine.seq_len}"
            raise ServeError("the prompt", why, "shorten it")

    async def answer(
        self, request: Request, stops: Sequence[str] = (), echo: bool = False, own: int = 0
    ) -> AsyncGenerator[Piece]:
        """Yield one piece per update of the engine, the last one with the reason why the answer ends.

        Closing the generator early ends the engine's work on the request.

        Args:
            request: the request to the engine.
            stops: stop strings; the answer ends before the first of them.
            echo: whether the text begins with the prompt's text.
            own: number of tokens at the prompt's start that were added here; their scores are not reported to the
                client.

        Raises:
            BusyError, EngineError: raised by `Engine.generate`.
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
        """Yield the scores with texts. `at_start`: no token with a text comes before the first of them."""
        for token, logprob, alternatives in row:
            part, special = self._bytes[token], token in self.decode.special
            text = self.decode([token]) if at_start or special else part.decode("utf-8", "replace")
            at_start &= special
            tops = [(self._bytes[other], logprob) for other, logprob in alternatives]
            yield ScoredText(part, len(text), logprob, tops)
