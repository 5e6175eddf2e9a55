"""Continuous batching: which tokens of which requests the next step computes, and which waiting request is next.

Each step takes one token of every running answer (decode) and, within its budget, the next pieces of prompts (prefill);
so a long prompt delays answers by one budget at a time. A prompt is cut every `PIECE` tokens and never elsewhere: the
tokens that a request's attention computes together are then the same whatever other requests there are. They do not
depend on earlier requests either: a prompt reuses only whole pieces of earlier prompts, and nothing that was computed
in another way.

A request is admitted when the cache has room for its prompt and its longest possible answer, so no request is ever
preempted. Waiting requests take turns by client.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

from mhmoe_ray.serve.engine.block_pool import BLOCK, BlockPool, blocks_for, name_after
from mhmoe_ray.serve.engine.request import Request, Scored
from mhmoe_ray.serve.engine.threaded import Deliver, Ticket

T = TypeVar("T")


class Turns(Generic[T]):
    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()
        """Queue of each client with waiting requests; the client at the front has the next turn."""

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[T]:
        return (one for queue in self._queues.values() for one in queue)

    def add(self, client: str, one: T) -> None:
        self._queues.setdefault(client, deque()).append(one)

    def first(self) -> T | None:
        """Return the item whose turn it is; None if the queue is empty."""
        return next(iter(self._queues.values()))[0] if self._queues else None

    def pop(self) -> T:
        """Remove and return the item whose turn it is; its client then goes behind all others.

        The queue must not be empty.
        """
        client, queue = self._queues.popitem(last=False)
        one = queue.popleft()
        if queue:
            self._queues[client] = queue
        return one

    def remove(self, client: str, one: T) -> None:
        """Remove an item, if it is in the queue."""
        queue = self._queues.get(client)
        if queue is None or one not in queue:
            return
        queue.remove(one)
        if not queue:
            del self._queues[client]


PIECE = 4 * BLOCK
"""Number of prompt tokens that are computed together."""


class Sequence(Ticket):
    def __init__(self, request: Request, room: int, deliver: Deliver) -> None:
        super().__init__(request, room, deliver)
        self.ids = list(request.prompt_ids)
        """Token ids of the prompt and of the answer so far."""
        self.computed = 0
        """Number of tokens at the start whose keys and values are in the cache."""
        self.blocks: list[int] = []
        self.prompt: list[Scored] = []
        """Scores of the prompt's tokens so far, if the request asks for them."""
        self._named, self._name = 0, b""

    @property
    def answer(self) -> int:
        """Number of tokens of the answer so far."""
        return len(self.ids) - len(self.request.prompt_ids)

    def new_names(self) -> Iterator[tuple[bytes, int]]:
        """Yield the hash and the id of each block that has become full since the last call, within the prompt's whole
        pieces.

        The rest of the prompt and the answer are left out: they are computed in another way than as part of a longer
        prompt, which would get other bits from them.
        """
        whole = len(self.request.prompt_ids) // PIECE * PIECE
        while (self._named + 1) * BLOCK <= min(self.computed, whole):
            start = self._named * BLOCK
            self._name = name_after(self._name, self.ids[start : start + BLOCK])
            yield self._name, self.blocks[self._named]
            self._named += 1


class Part(NamedTuple):
    """Tokens of a sequence that are computed together in one step."""

    sequence: Sequence
    start: int
    tokens: int

    @property
    def ends(self) -> bool:
        """Whether a new token follows this part."""
        return self.start + self.tokens == len(self.sequence.ids)


class Scheduler:
    """Decides what each step computes. Not thread-safe: only one thread may use it at a time."""

    def __init__(self, pool: BlockPool, most: int, budget: int) -> None:
        """Create a scheduler without requests.

        Args:
            pool: the blocks of the KV cache.
            most: largest number of running requests.
            budget: number of prompt tokens per step, in addition to one token per answer.
        """
        assert budget >= PIECE
        self.pool, self._most, self._budget = pool, most, budget
        self.running: list[Sequence] = []
        self._waiting = Turns[Sequence]()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def everyone(self) -> list[Sequence]:
        return [*self.running, *self._waiting]

    def add(self, sequence: Sequence) -> None:
        self._waiting.add(sequence.request.client, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that is done or unwanted; it may have been removed already."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.pool.drop(sequence.blocks)
        else:
            self._waiting.remove(sequence.request.client, sequence)

    def next(self) -> list[Part]:
        """Return the parts that the next step computes, admitting waiting requests; none if there are no requests."""
        parts = [Part(s, s.computed, 1) for s in self.running if s.answer]
        left = self._budget
        for sequence in [s for s in self.running if not s.answer]:
            left = self._begin(parts, sequence, left)
        while left >= PIECE and len(self.running) < self._most and (newcomer := self._let_in()):
            left = self._begin(parts, newcomer, left)
        return parts

    def computed(self, part: Part) -> None:
        """Record that the step with this part is done, and cache the blocks that have become full."""
        part.sequence.computed = part.start + part.tokens
        for name, block in part.sequence.new_names():
            self.pool.remember(name, block)

    def _begin(self, parts: list[Part], sequence: Sequence, left: int) -> int:
        """Add pieces of the sequence's prompt to `parts`; return the rest of the budget."""
        start = sequence.computed
        while start < len(sequence.ids) and left >= PIECE:
            tokens = min(PIECE, len(sequence.ids) - start)
            parts.append(Part(sequence, start, tokens))
            start, left = start + tokens, left - tokens
        return left

    def _let_in(self) -> Sequence | None:
        """Admit and return the waiting request whose turn it is, if the cache has room for it; otherwise return None.

        No smaller request is admitted before it.
        """
        sequence = self._waiting.first()
        if sequence is None:
            return None
        known: list[int] = []
        if not sequence.request.prompt_logprobs:
            # In whole pieces. The last token is computed in any case: what follows it is asked for.
            known = self.pool.known(sequence.ids[:-1])
            known = known[: len(known) * BLOCK // PIECE * PIECE // BLOCK]
        needed = blocks_for(len(sequence.ids) + sequence.room) - len(known)
        self.pool.hold(known)  # first, so that none of them is taken
        if needed > self.pool.free:
            self.pool.drop(known)
            return None
        self._waiting.pop()
        sequence.blocks = [*known, *self.pool.take(needed)]
        sequence.computed = len(known) * BLOCK
        self.running.append(sequence)
        return sequence
