"""The scheduler: it chooses the tokens that the next step computes (continuous batching), and admits waiting requests.

Each step computes one token of every running answer (decode) and, within its budget, the next chunks of prompts
(prefill), so a long prompt delays a step by at most one budget. A prompt is cut every `PREFILL_CHUNK` tokens and reuses
only whole chunks of earlier prompts: the tokens that a request's attention computes together then depend on no other
request.

A request is admitted when the cache has room for its longest possible answer, so no request is ever preempted. Waiting
clients take turns.
"""

from collections.abc import Iterator
from typing import NamedTuple

from mhmoe_ray.serving.engine.block_pool import BLOCK_SIZE, BlockPool, count_blocks, next_block_hash
from mhmoe_ray.serving.engine.fair_queue import FairQueue
from mhmoe_ray.serving.engine.packed_model import ServedAdapter
from mhmoe_ray.serving.engine.request import Request, ScoredToken
from mhmoe_ray.serving.engine.threaded import Deliver, RequestState

# This is a multiple of the block size, because the KV cache shares whole blocks between requests, and a prompt reuses
# only whole chunks.
PREFILL_CHUNK = 4 * BLOCK_SIZE
"""Number of tokens of a prefill chunk; the last one of a prompt may have fewer."""


class Sequence(RequestState):
    """A request with its tokens so far and its blocks of the KV cache."""

    def __init__(
        self, request: Request, max_new_tokens: int, deliver: Deliver, adapter: ServedAdapter | None = None
    ) -> None:
        super().__init__(request, max_new_tokens, deliver)
        self.adapter = adapter
        # The same tokens have other keys and values with another adapter.
        self.root_hash = adapter.digest if adapter else b""
        self.token_ids = list(request.prompt_ids)
        self.computed_tokens = 0
        """Number of tokens at the start whose keys and values are in the cache."""
        self.block_ids: list[int] = []
        self.prompt_scores: list[ScoredToken] = []
        self._hashed_blocks, self._last_hash = 0, self.root_hash

    @property
    def answer_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    def new_block_hashes(self) -> Iterator[tuple[bytes, int]]:
        """Yield the block hash and id of each block of a whole prefill chunk that is full since the last call."""
        # The tokens after the last whole chunk and those of the answer are computed in smaller chunks than in a longer
        # prompt, so their keys and values differ in the last bits. A prompt that reused them could get another answer
        # than on a fresh engine.
        cacheable_tokens = len(self.request.prompt_ids) // PREFILL_CHUNK * PREFILL_CHUNK
        while (self._hashed_blocks + 1) * BLOCK_SIZE <= min(self.computed_tokens, cacheable_tokens):
            start = self._hashed_blocks * BLOCK_SIZE
            self._last_hash = next_block_hash(self._last_hash, self.token_ids[start : start + BLOCK_SIZE])
            yield self._last_hash, self.block_ids[self._hashed_blocks]
            self._hashed_blocks += 1


class TokenChunk(NamedTuple):
    """Tokens of a sequence that one step computes: a prefill chunk, or one token of an answer."""

    sequence: Sequence
    start: int
    length: int

    @property
    def is_last(self) -> bool:
        """True if the sequence ends with this chunk, so that its logits give the next token."""
        return self.start + self.length == len(self.sequence.token_ids)


class Scheduler:
    """Scheduler of the sequences of one engine; only one thread may use it at a time."""

    def __init__(self, pool: BlockPool, max_running: int, prefill_budget: int) -> None:
        """Create a scheduler; `prefill_budget` is in prompt tokens per step, besides one token per answer."""
        assert prefill_budget >= PREFILL_CHUNK
        self.pool, self._max_running, self._prefill_budget = pool, max_running, prefill_budget
        self.running: list[Sequence] = []
        self._waiting_queue = FairQueue[Sequence]()

    @property
    def waiting_count(self) -> int:
        """Number of waiting requests."""
        return len(self._waiting_queue)

    def all_sequences(self) -> list[Sequence]:
        """Return the running sequences, then the waiting ones."""
        return [*self.running, *self._waiting_queue]

    def add(self, sequence: Sequence) -> None:
        """Add a sequence to the queue of waiting sequences."""
        self._waiting_queue.add(sequence.request.client, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a running or waiting sequence, if it is there, and release its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.pool.release(sequence.block_ids)
        else:
            self._waiting_queue.remove(sequence.request.client, sequence)

    def schedule(self) -> list[TokenChunk]:
        """Admit waiting requests that fit in the KV cache, and return the chunks of the next step."""
        # Requests that are generating answers come first and do not count against the budget, so new prompts never
        # stall them.
        chunks = [TokenChunk(s, s.computed_tokens, 1) for s in self.running if s.answer_tokens]
        remaining_budget = self._prefill_budget
        for sequence in [s for s in self.running if not s.answer_tokens]:
            remaining_budget = self._add_prefill_chunks(chunks, sequence, remaining_budget)
        while (
            remaining_budget >= PREFILL_CHUNK
            and len(self.running) < self._max_running
            and (admitted_sequence := self._admit_next())
        ):
            remaining_budget = self._add_prefill_chunks(chunks, admitted_sequence, remaining_budget)
        return chunks

    def record_computed(self, chunk: TokenChunk) -> None:
        """Record that a chunk has been computed, and register its full prompt blocks for prefix caching."""
        chunk.sequence.computed_tokens = chunk.start + chunk.length
        for block_hash, block_id in chunk.sequence.new_block_hashes():
            self.pool.cache_block(block_hash, block_id)

    def _add_prefill_chunks(self, chunks: list[TokenChunk], sequence: Sequence, remaining_budget: int) -> int:
        """Add the sequence's next prefill chunks to `chunks`, and return the rest of the budget."""
        start = sequence.computed_tokens
        while start < len(sequence.token_ids) and remaining_budget >= PREFILL_CHUNK:
            length = min(PREFILL_CHUNK, len(sequence.token_ids) - start)
            chunks.append(TokenChunk(sequence, start, length))
            start, remaining_budget = start + length, remaining_budget - length
        return remaining_budget

    def _admit_next(self) -> Sequence | None:
        """Admit the next waiting request, if there is one and the cache has room for it, and reuse cached blocks."""
        # If the next request does not fit, no smaller one is admitted in its place. Otherwise a large request could
        # wait without end.
        sequence = self._waiting_queue.peek()
        if sequence is None:
            return None
        matching_blocks: list[int] = []
        # A request that asks for scores of its prompt reuses no blocks, because the scores need the logits of all
        # tokens of the prompt, which only computing these tokens gives.
        if not sequence.request.prompt_logprobs:
            # The last token is always computed, because its logits give the first token of the answer.
            matching_blocks = self.pool.match_prefix(sequence.token_ids[:-1], sequence.root_hash)
            matching_blocks = matching_blocks[
                : len(matching_blocks) * BLOCK_SIZE // PREFILL_CHUNK * PREFILL_CHUNK // BLOCK_SIZE
            ]
        block_count = count_blocks(len(sequence.token_ids) + sequence.max_new_tokens) - len(matching_blocks)
        # The references are taken before the allocation, which could otherwise evict matching blocks that are free.
        self.pool.add_reference(matching_blocks)
        if block_count > self.pool.free_count:
            self.pool.release(matching_blocks)
            return None
        self._waiting_queue.pop()
        sequence.block_ids = [*matching_blocks, *self.pool.allocate(block_count)]
        sequence.computed_tokens = len(matching_blocks) * BLOCK_SIZE
        self.running.append(sequence)
        return sequence
