"""The engine: a prompt in, pieces of the answer out.

Each request has caches and a random generator of its own, so several threads may generate at once. A request is an
iterator that computes one token per step: whoever stops asking (a client that has gone) stops the work.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from tokenizers import Tokenizer

from mhmoe_ray.data.tokenizer import boundaries
from mhmoe_ray.errors import ServeError
from mhmoe_ray.location import Location
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.serve.load import load_model, load_run_tokenizer
from mhmoe_ray.serve.sampling import Sampling, choose
from mhmoe_ray.serve.text import TextDecoder, TextStream


class Piece(NamedTuple):
    text: str
    """The next part of the answer; empty while nothing more is certain."""
    tokens: int
    """Tokens of the answer so far."""
    finish_reason: Literal["stop", "length"] | None = None
    """Set on the last piece only: end of text or a stop string, or a limit on tokens."""


class Engine:
    def __init__(self, model: Decoder, tokenizer: Tokenizer, seq_len: int) -> None:
        """Args:
        model: with all experts, in evaluation mode.
        tokenizer: with tokens for the edges of a document.
        seq_len: tokens that prompt and answer may have together.
        """
        self.model, self.tokenizer, self.seq_len = model, tokenizer, seq_len
        edges = boundaries(tokenizer)
        assert edges is not None
        self._start, self._ends = edges
        self._decode = TextDecoder(tokenizer)
        # The model may have more rows than the tokenizer has tokens; those have no text.
        self._known = tokenizer.get_vocab_size()

    @classmethod
    def from_checkpoint(cls, checkpoint: Location) -> "Engine":
        """The engine of a checkpoint directory inside its run directory.

        Raises:
            CheckpointError, DataError: the checkpoint or the run's tokenizer is missing or damaged.
        """
        model, manifest = load_model(checkpoint)
        return cls(model, load_run_tokenizer(checkpoint, manifest), manifest.seq_len)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of the prompt as the start of a document.

        Raises:
            ServeError: it leaves no room for an answer.
        """
        ids = [self._start, *self.tokenizer.encode(prompt, add_special_tokens=False).ids]
        if len(ids) >= self.seq_len:
            why = f"it has {len(ids)} tokens, and prompt and answer together may have {self.seq_len}"
            raise ServeError("the prompt", why, "shorten it")
        return ids

    def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Token ids of the answer, one per step. Ends at the end of text, which is not yielded, or at a limit.

        Args:
            prompt_ids: from `encode`; at least one, fewer than `seq_len`.
            sampling: how to choose; `max_tokens` may reach beyond `seq_len`, which then ends the answer.
        """
        room = self._room(prompt_ids, sampling)
        generator = sampling.generator()
        with torch.inference_mode():
            caches = self.model.new_caches(1, len(prompt_ids) + room)
        new = list(prompt_ids)
        for _ in range(room):
            # Inference mode belongs to a thread, and another one may take the next step: none of it outside the step.
            with torch.inference_mode():
                logits_BTV = self.model(torch.tensor([new]), caches).logits_BTV
                token = choose(logits_BTV[0, -1, : self._known], sampling, generator)
            if token in self._ends:
                return
            yield token
            new = [token]

    def complete(self, prompt_ids: Sequence[int], sampling: Sampling, stops: Sequence[str] = ()) -> Iterator[Piece]:
        """The answer as text, one piece per token and a last one with the reason why it ends.

        Args:
            prompt_ids: from `encode`.
            sampling: as for `generate`.
            stops: the answer ends before the first of these strings.
        """
        text, count = TextStream(self._decode, stops, prompt_ids), 0
        for token in self.generate(prompt_ids, sampling):
            count += 1
            yield Piece(text.push(token), count)
            if text.stopped:
                break
        rest = text.finish()
        at_limit = count == self._room(prompt_ids, sampling)
        yield Piece(rest, count, "length" if at_limit and not text.stopped else "stop")

    def _room(self, prompt_ids: Sequence[int], sampling: Sampling) -> int:
        """Tokens that the answer may have."""
        return min(sampling.max_tokens, self.seq_len - len(prompt_ids))
