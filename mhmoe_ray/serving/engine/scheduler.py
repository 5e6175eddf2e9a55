"""The scheduler: it chooses the tokens that the next step computes (continuous batching), and admits waiting requests.

Each step computes one token of every running answer (decode) and, within its budget, the next chunks of prompts
(prefill), so a long prompt delays a step by at most one budget. A prompt is cut every `PREFILL_CHUNK` tokens and reuses
only whole chunks of earlier prompts: the tokens that a request's attention computes together then depend on no other
request.

A request is admitted when the cache has room for its longest possible answer, so no request is ever preempted. Clients
take turns by tokens: while one needs few tokens, requests of others pause, and keep their blocks.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from typing import NamedTuple

from mhmoe_ray.serving.engine.block_pool import BLOCK_SIZE, BlockPool, count_blocks, next_block_hash
from mhmoe_ray.serving.engine.fair_queue import FairQueue, TokenTurns, slots_of_client
from mhmoe_ray.serving.engine.packed_model import ServedAdapter
from mhmoe_ray.serving.engine.request import Request, ScoredToken, TokenRoutes
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
        self.routes: list[TokenRoutes] = []
        """Routes of computed tokens, for the next update."""
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

    def __init__(self, pool: BlockPool, max_running: int, prefill_budget: int, seq_len: int) -> None:
        """Create a scheduler; `prefill_budget` is in prompt tokens per step, besides one token per answer.

        A client that already runs requests leaves the blocks of one request of `seq_len` tokens to others.
        """
        assert prefill_budget >= PREFILL_CHUNK
        self.pool, self._max_running, self._prefill_budget = pool, max_running, prefill_budget
        self._spare_blocks = min(count_blocks(seq_len), pool.size - count_blocks(seq_len))
        self.running: list[Sequence] = []
        # With the chunk by which a client may pass the limit, it is at most one request ahead.
        self._waiting_queue = FairQueue[Sequence](TokenTurns(max(0, seq_len - PREFILL_CHUNK)))

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
        pending: defaultdict[str, deque[TokenChunk]] = defaultdict(deque)
        for sequence in sorted(self.running, key=lambda s: not s.answer_tokens):
            pending[sequence.request.client].extend(_next_chunks(sequence))
        clients = dict.fromkeys([*pending, *self._waiting_queue.clients])
        chunks: list[TokenChunk] = []
        sequences = set[Sequence]()
        remaining_budget, admits, admits_running = self._prefill_budget, True, True

        def take(client: str) -> int:
            nonlocal remaining_budget, admits, admits_running
            queue = pending[client]
            has_budget = remaining_budget >= PREFILL_CHUNK
            if not queue and self._waiting_queue.peek(client) and has_budget and len(sequences) < self._max_running:
                running_count = sum(s.request.client == client for s in self.running)
                is_full = len(self.running) >= self._max_running
                if is_full and running_count >= slots_of_client(self._max_running, len(clients)):
                    return 0
                if not admits or (running_count and not admits_running):
                    return 0
                # If a request does not fit, no smaller one is admitted in its place. Otherwise a large request could
                # wait without end. The spare blocks remain for clients without running requests.
                if not (sequence := self._admit(client, self._spare_blocks if running_count else 0)):
                    admits, admits_running = admits and running_count > 0, False
                    return 0
                queue.extend(_next_chunks(sequence))
            if not queue or (len(sequences) == self._max_running and queue[0].sequence not in sequences):
                return 0
            if not queue[0].sequence.answer_tokens:
                if not has_budget:
                    return 0
                remaining_budget -= queue[0].length
            chunks.append(queue.popleft())
            sequences.add(chunks[-1].sequence)
            return chunks[-1].length

        self._waiting_queue.turns.share_step(clients, take, lambda client: self._waiting_queue.peek(client) is not None)
        return chunks

    def record_computed(self, chunk: TokenChunk) -> None:
        """Record that a chunk has been computed, and register its full prompt blocks for prefix caching."""
        chunk.sequence.computed_tokens = chunk.start + chunk.length
        for block_hash, block_id in chunk.sequence.new_block_hashes():
            self.pool.cache_block(block_hash, block_id)

    def _admit(self, client: str, spare_blocks: int) -> Sequence | None:
        """Admit a client's next request if the cache has room for it and spare blocks, and reuse cached blocks."""
        sequence = self._waiting_queue.peek(client)
        assert sequence is not None
        matching_blocks: list[int] = []
        # Scores and routes of a prompt need all its tokens to be computed, so such a request reuses no blocks.
        if not sequence.request.needs_all_tokens:
            # The last token is always computed, because its logits give the first token of the answer.
            matching_blocks = self.pool.match_prefix(sequence.token_ids[:-1], sequence.root_hash)
            matching_blocks = matching_blocks[
                : len(matching_blocks) * BLOCK_SIZE // PREFILL_CHUNK * PREFILL_CHUNK // BLOCK_SIZE
            ]
        block_count = count_blocks(len(sequence.token_ids) + sequence.max_new_tokens) - len(matching_blocks)
        # The references are taken before the allocation, which could otherwise evict matching blocks that are free.
        self.pool.add_reference(matching_blocks)
        if block_count + spare_blocks > self.pool.free_count:
            self.pool.release(matching_blocks)
            return None
        self._waiting_queue.pop(client)
        sequence.block_ids = [*matching_blocks, *self.pool.allocate(block_count)]
        sequence.computed_tokens = len(matching_blocks) * BLOCK_SIZE
        self.running.append(sequence)
        return sequence


def _next_chunks(sequence: Sequence) -> Iterator[TokenChunk]:
    """Yield the token of an answer that is next, or all further chunks of a prompt."""
    for start in range(sequence.computed_tokens, len(sequence.token_ids), PREFILL_CHUNK):
        yield TokenChunk(sequence, start, min(PREFILL_CHUNK, len(sequence.token_ids) - start))
