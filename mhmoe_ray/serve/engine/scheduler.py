"""Continuous batching: which tokens of which requests are computed next, and whose turn it is.

Each step takes one token of every answer under way and, as far as its budget goes, the next pieces of prompts; so a
long prompt holds answers up by one budget at a time. A prompt is cut every `PIECE` tokens and never elsewhere: what a
request's attention computes together is then the same whatever other requests there are. Whatever there were before,
too: a prompt takes over whole pieces of earlier prompts, and nothing that was computed otherwise.

A request is let in when there is room for all that it may become, so that none is ever sent away again. Those who wait
take turns by client.
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
        """Of each client that has someone waiting; the first one's turn is next."""

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[T]:
        return (one for queue in self._queues.values() for one in queue)

    def add(self, client: str, one: T) -> None:
        self._queues.setdefault(client, deque()).append(one)

    def first(self) -> T | None:
        """The one whose turn it is."""
        return next(iter(self._queues.values()))[0] if self._queues else None

    def pop(self) -> T:
        """The one whose turn it is, which there must be; its client's next one is then behind everyone else's."""
        client, queue = self._queues.popitem(last=False)
        one = queue.popleft()
        if queue:
            self._queues[client] = queue
        return one

    def remove(self, client: str, one: T) -> None:
        """If it is there."""
        queue = self._queues.get(client)
        if queue is None or one not in queue:
            return
        queue.remove(one)
        if not queue:
            del self._queues[client]


PIECE = 4 * BLOCK
"""Tokens of a prompt that are computed together."""


class Sequence(Ticket):
    def __init__(self, request: Request, room: int, deliver: Deliver) -> None:
        super().__init__(request, room, deliver)
        self.ids = list(request.prompt_ids)
        """Prompt and answer so far."""
        self.computed = 0
        """Tokens at its start whose keys and values are in the cache."""
        self.blocks: list[int] = []
        self.prompt: list[Scored] = []
        """Scores of the prompt so far, where asked for."""
        self._named, self._name = 0, b""

    @property
    def answer(self) -> int:
        """Tokens of it so far."""
        return len(self.ids) - len(self.request.prompt_ids)

    def new_names(self) -> Iterator[tuple[bytes, int]]:
        """Name and block of each block that has become full, as far as the prompt is in whole pieces: its rest and the
        answer are computed otherwise than as part of a longer prompt, which would get other bits from them."""
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
        """Whether a new token follows."""
        return self.start + self.tokens == len(self.sequence.ids)


class Scheduler:
    """Knows nothing of threads: one at a time."""

    def __init__(self, pool: BlockPool, most: int, budget: int) -> None:
        """Args:
        pool: of the cache.
        most: requests that are under way at a time.
        budget: tokens of a step, above those of answers.
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
        """It is done, or nobody wants it; it may be gone already."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.pool.drop(sequence.blocks)
        else:
            self._waiting.remove(sequence.request.client, sequence)

    def next(self) -> list[Part]:
        """What the next step computes; nothing where nobody is there."""
        parts = [Part(s, s.computed, 1) for s in self.running if s.answer]
        left = self._budget
        for sequence in [s for s in self.running if not s.answer]:
            left = self._begin(parts, sequence, left)
        while left >= PIECE and len(self.running) < self._most and (newcomer := self._let_in()):
            left = self._begin(parts, newcomer, left)
        return parts

    def computed(self, part: Part) -> None:
        """The step with this part is done."""
        part.sequence.computed = part.start + part.tokens
        for name, block in part.sequence.new_names():
            self.pool.remember(name, block)

    def _begin(self, parts: list[Part], sequence: Sequence, left: int) -> int:
        """Add pieces of its prompt; returns what is left of the budget."""
        start = sequence.computed
        while start < len(sequence.ids) and left >= PIECE:
            tokens = min(PIECE, len(sequence.ids) - start)
            parts.append(Part(sequence, start, tokens))
            start, left = start + tokens, left - tokens
        return left

    def _let_in(self) -> Sequence | None:
        """The one whose turn it is, if there is room for it: nobody is let in before it for being smaller."""
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
