"""Text in, text out: encode prompts for an engine, decode its answers as they arrive, and apply stop strings."""

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import BaseModel
from tokenizers import Tokenizer

from mhmoe_ray.checkpoint.manifest import step_and_group
from mhmoe_ray.data.chat.process import ChatTemplateError
from mhmoe_ray.data.chat.template import EXCHANGES, SPELLING_MARK, ChatTemplate
from mhmoe_ray.data.tokenizer import boundaries, boundary_texts, chat_texts, token_count
from mhmoe_ray.errors import ServeError
from mhmoe_ray.families import ModelKind
from mhmoe_ray.planner.sizes import compute_sizes
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serving.detokenizer import TextDecoder, TextStream, TokenBytes
from mhmoe_ray.serving.engine import (
    Engine,
    FinishReason,
    Request,
    ScoredToken,
    ServedEngine,
    ServedWeights,
    TextEngine,
    TokenRoutes,
)
from mhmoe_ray.serving.sampling import SamplingParams
from mhmoe_ray.spec import ModelSpec


def load_chat_template(run: RunDir, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return a run's chat template, if any; an invalid `chat_template.jinja` is a ServeError."""
    file = run.chat_template_file
    text = file.read_text() if file.exists() else None
    return parse_chat_template(text, tokenizer, "correct chat_template.jinja in the run directory")


def parse_chat_template(text: str | None, tokenizer: Tokenizer, fix: str) -> ChatTemplate | None:
    """Parse a chat template in Jinja, if any; an invalid one is a ServeError that proposes `fix`."""
    if text is None:
        return None
    try:
        template = ChatTemplate(text, *chat_texts(tokenizer))
        template.accepts(EXCHANGES)
    except ChatTemplateError as e:
        raise ServeError("the chat template", str(e), fix) from e
    return template


class ScoredText(NamedTuple):
    """A token with its score: its log-probability and the most likely tokens in its place, likeliest first.

    Tokens are UTF-8 bytes, which may cut characters. A prompt's first token has no log-probability.
    """

    token_bytes: bytes
    character_count: int
    """Number of characters that the token adds to the answer, if it consists of complete characters.

    A special token, or a dropped space at the start, adds none.
    """
    logprob: float | None
    alternatives: list[tuple[bytes, float]]


class AnswerPiece(NamedTuple):
    """The next piece of a streamed answer, with the number of tokens so far."""

    text: str
    """The next part of the text; empty while later tokens could change what follows."""
    token_count: int
    """Number of tokens of the answer so far."""
    scores: tuple[ScoredText, ...] = ()
    """Scores of the tokens since the last piece, if the request asks for them."""
    finish_reason: FinishReason | None = None
    """Reason why the answer ends; set on the last piece only."""
    routes: tuple[TokenRoutes, ...] = ()
    """Routes of computed tokens since the last piece, if the request asks for them."""


def join_pieces(pieces: Sequence[AnswerPiece]) -> AnswerPiece:
    """Join consecutive pieces of one answer into a single piece."""
    return AnswerPiece(
        "".join(piece.text for piece in pieces),
        pieces[-1].token_count,
        tuple(score for piece in pieces for score in piece.scores),
        pieces[-1].finish_reason,
        tuple(route for piece in pieces for route in piece.routes),
    )


class ModelDetails(BaseModel):
    """Name and sizes of the served model, as clients see them."""

    checkpoint: str
    """Id of the run and name of its checkpoint, separated by a slash."""
    digest: str
    """Hash of the weights' files (`CheckpointManifest.weights_sha256`); empty for a model in memory."""
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
    def from_spec(cls, checkpoint: str, model: ModelSpec, digest: str = "") -> Self:
        model_sizes, moe = compute_sizes(model), model.moe
        return cls(
            checkpoint=checkpoint,
            digest=digest,
            parameters=model_sizes.parameters,
            active_parameters=model_sizes.active_parameters,
            layers=model.layers,
            experts=moe.experts if moe else 0,
            top_k=moe.top_k if moe else 0,
            heads=moe.heads if moe else 1,
        )

    @property
    def weights(self) -> ServedWeights:
        checkpoint = Path(self.checkpoint)
        step, _ = step_and_group(checkpoint)
        return ServedWeights(str(checkpoint.parent), step, self.digest)


def check_length(prompt_ids: Sequence[int], has_answer: bool, seq_len: int) -> None:
    """Raise ServeError if a prompt, and the first token of its answer if any, exceed `seq_len` tokens."""
    if len(prompt_ids) + has_answer > seq_len:
        reason = f"it has {len(prompt_ids)} tokens, and prompt and answer together may have {seq_len}"
        raise ServeError("the prompt", reason, "shorten it")


def check_biases(sampling: SamplingParams, tokenizer_size: int) -> None:
    """Raise ServeError if a bias is for a token that the tokenizer does not have."""
    if unknown_token := next((token for token in sampling.logit_bias if token >= tokenizer_size), None):
        reason = f"there is no token {unknown_token}; there are {tokenizer_size}"
        raise ServeError("logit_bias", reason, "give tokens of the model")


class PromptEncoder:
    """Encoder that turns prompts into token ids in the form of the model's training texts."""

    def __init__(self, tokenizer: Tokenizer, adds_start: bool) -> None:
        self.tokenizer, self.adds_start = tokenizer, adds_start
        self.start_token = boundaries(tokenizer).start

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt, with a start token if the model was trained with one."""
        ids = self._encode_texts([prompt])
        # The model needs a token to continue from, so an empty prompt becomes the start token in any case.
        return [self.start_token, *ids] if self.adds_start or not ids else ids

    def count_added(self, token_ids: Sequence[int]) -> int:
        """Return how many start tokens `encode` put in front of a text to get `token_ids`: 1 or 0."""
        return int(self.adds_start or list(token_ids) == [self.start_token])

    def encode_chat(
        self, template: ChatTemplate, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """Return the token ids of a conversation, up to where the assistant's next answer begins.

        They have a start token if the model was trained with one, even if the template lacks it. Messages that the
        template does not accept, or tools for which it has no place, are a ServeError.
        """
        try:
            prompt = template.render(messages)
            if tools and prompt == (prompt := template.render(messages, tools=list(tools))):
                raise ChatTemplateError("its chat template has no place for tools")
        except ChatTemplateError as e:
            raise ServeError("the messages", str(e), "send what the model's chat template takes") from e
        ids = self._encode_texts(prompt.split(SPELLING_MARK))
        return ids if ids[:1] == [self.start_token] or not self.adds_start else [self.start_token, *ids]

    def _encode_texts(self, texts: list[str]) -> list[int]:
        # The library `tokenizers` lets other threads run only while it encodes batches.
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [token for encoding in encodings for token in encoding.ids]


class ServedModel:
    """A served model: its engine, and its name and sizes for clients."""

    kind: ClassVar[ModelKind]

    def __init__(self, engine: ServedEngine, details: ModelDetails) -> None:
        self.engine, self.details = engine, details

    @property
    def adapters(self) -> Mapping[str, ServedWeights]:
        """Adapters of the model, by the names that requests may give in its place."""
        return {}


class ServedText(ServedModel, PromptEncoder):
    """A served model that reads texts."""

    engine: TextEngine

    def __init__(
        self, engine: TextEngine, tokenizer: Tokenizer, details: ModelDetails, adds_start: bool = True
    ) -> None:
        ServedModel.__init__(self, engine, details)
        PromptEncoder.__init__(self, tokenizer, adds_start)
        self.template: ChatTemplate | None = None
        self.tokenizer_size = token_count(tokenizer)
        """Number of the tokenizer's token ids; every id is below this number."""
        self.boundary_texts = boundary_texts(tokenizer)
        self.decode = TextDecoder(tokenizer)


class Answerer(ServedText):
    """A served decoder, which answers prompts with text."""

    kind = "decoder"
    engine: Engine

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        details: ModelDetails,
        adds_start: bool = True,
    ) -> None:
        super().__init__(engine, tokenizer, details, adds_start)
        self.template = template
        self._token_bytes = TokenBytes(tokenizer, self.decode)

    @property
    def adapters(self) -> Mapping[str, ServedWeights]:
        return self.engine.adapters

    def check_length(self, prompt_ids: Sequence[int], has_answer: bool) -> None:
        """Raise ServeError if a prompt does not fit in the model's context."""
        check_length(prompt_ids, has_answer, self.engine.seq_len)

    async def answer(self, request: Request, echo: bool = False, added_tokens: int = 0) -> AsyncGenerator[AnswerPiece]:
        """Yield a piece of the answer for each update of the engine, the last one with the finish reason.

        The answer ends before the first stop string. With `echo`, the text begins with the prompt's. The first
        `added_tokens` of the prompt, which the client did not send, get no scores. Closing the generator early aborts
        the request. Errors are those of `Engine.generate`.
        """
        stream = TextStream(self.decode, request.sampling_params.stop, request.prompt_ids)
        token_count, opening = 0, self.decode(request.prompt_ids) if echo else ""
        async with aclosing(self.engine.generate(request)) as updates:
            async for update in updates:
                scores: list[ScoredText] = []
                if request.sampling_params.logprobs is not None:
                    scores += self._decode_scores(update.prompt_scores[added_tokens:], True)
                    scores += self._decode_scores(update.tokens, stream.at_start)
                text, opening = opening, ""
                for scored_token in update.tokens:
                    token_count += 1
                    text += stream.push(scored_token.token)
                # The engine does not know stop strings, so the answer ends here. Closing `updates` then aborts the
                # request in the engine.
                if stream.is_stopped:
                    yield AnswerPiece(text, token_count, tuple(scores), "stop", update.routes)
                    return
                if update.finish_reason:
                    text += stream.finish()
                    finish_reason: FinishReason = "stop" if stream.is_stopped else update.finish_reason
                    yield AnswerPiece(text, token_count, tuple(scores), finish_reason, update.routes)
                    return
                yield AnswerPiece(text, token_count, tuple(scores), routes=update.routes)

    def _decode_scores(self, scored_tokens: Sequence[ScoredToken], at_start: bool) -> Iterator[ScoredText]:
        """Yield the scores of consecutive tokens; `at_start` is True if at most special tokens precede them."""
        # A decoder may drop the space at the start of a text. So the text of the first token that is not special comes
        # from the decoder, and not from its bytes.
        for token, logprob, alternatives in scored_tokens:
            token_bytes, is_special = self._token_bytes[token], token in self.decode.special_texts
            text = self.decode([token]) if at_start or is_special else token_bytes.decode("utf-8", "replace")
            at_start &= is_special
            decoded_alternatives = [(self._token_bytes[other_token], logprob) for other_token, logprob in alternatives]
            yield ScoredText(token_bytes, len(text), logprob, decoded_alternatives)
