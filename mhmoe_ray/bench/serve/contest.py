"""All contestants in turn, in every round, on the same prompts, which no round has seen before."""

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from mhmoe_ray.bench.serve.child import Child
from mhmoe_ray.bench.serve.engines import Place, Prompt
from mhmoe_ray.bench.serve.load import Load, closed_loop, open_loop
from mhmoe_ray.bench.serve.model import VOCAB
from mhmoe_ray.bench.timing import turns

PACKAGES = {
    "vllm": "vllm",
    "vLLM offline": "vllm",
    "transformers": "transformers",
    "vllm, alone": "vllm",
    "vllm, Ray Serve": "vllm",
    "vLLM's server": "vllm",
}
"""That contestants need beside ours."""

Tell = Callable[[str], None]


class Shape(NamedTuple):
    """Of requests."""

    prompt: int
    tokens: int
    """Of an answer, on average."""
    equal: bool = True
    """Whether all are of that length; else both are anything from a quarter of it to seven quarters."""

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its answer together."""
        return self.prompt + self.tokens if self.equal else self._most(self.prompt) + self._most(self.tokens)

    @staticmethod
    def _most(mean: int) -> int:
        return max(1, mean * 7 // 4)

    def requests(self, count: int, seed: str) -> list[Prompt]:
        """That no other seed gives."""
        draws = random.Random(seed)

        def length(mean: int) -> int:
            return mean if self.equal else draws.randint(max(1, mean // 4), self._most(mean))

        return [
            ([draws.randrange(1, VOCAB) for _ in range(length(self.prompt))], length(self.tokens)) for _ in range(count)
        ]


class Rates(NamedTuple):
    """One contestant at one number of clients."""

    name: str
    clients: int
    rates: list[float]
    """Tokens a second, one for each round."""
    first: list[float]
    """Seconds until the first token, medians of each round; empty where nothing was streamed."""

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def to(self, reference: "Rates") -> float:
        """Rate over another's, the median of rounds."""
        return statistics.median(a / b for a, b in zip(self.rates, reference.rates, strict=True))

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "rate": self.rate}


def engines(
    places: Mapping[str, tuple[str, Place]], shape: Shape, clients: Sequence[int], rounds: int, tell: Tell
) -> list[Rates]:
    """So many requests at a time, four times over.

    Args:
        places: by a name of its own, each contestant's engine and what it serves.
        shape: of requests; where answers have one token, those of prompts are counted.
        clients: numbers of requests at a time.
        rounds: each of all contestants, every other one in reverse order; one before them is not counted.
        tell: gets a line after each.

    Raises:
        JobError: one of them failed.
    """
    rates: dict[tuple[str, int], list[float]] = {(name, n): [] for n in clients for name in places}
    with ExitStack() as stack:
        children = {name: stack.enter_context(Child(engine, place)) for name, (engine, place) in places.items()}
        for turn, (name, n) in turns(rates, rounds, warm_up=True):
            asked = shape.requests(4 * n, f"{turn} {n}")
            counted = sum(tokens if shape.tokens > 1 else len(ids) for ids, tokens in asked)
            seconds = children[name].ask(asked, n)
            if turn >= 0:
                rates[name, n].append(counted / seconds)
                tell(f"round {turn + 1}, {n} at a time: {name} {rates[name, n][-1]:,.0f} tokens/s")
    return [Rates(name, n, found, []) for (name, n), found in rates.items()]


def servers(
    names: Sequence[str], place: Place, shape: Shape, clients: Sequence[int], stream: bool, rounds: int, tell: Tell
) -> list[Rates]:
    """So many clients, each of which asks again when it has its answer.

    Args:
        names: of `SERVERS`.
        place: what is served.
        shape: of requests.
        clients: how many.
        stream: whether answers come token by token.
        rounds, tell: as of `engines`.
    """

    def once(url: str, n: int, turn: int) -> Load:
        return closed_loop(url, shape.requests(n * max(3, 8 // n), f"{turn} {n} {stream}"), n, stream)

    return list(_served(names, place, clients, once, rounds, tell))


def by_chance(
    names: Sequence[str], place: Place, shape: Shape, rate: float, seconds: float, rounds: int, tell: Tell
) -> list[Rates]:
    """Requests that come at random, streamed; `clients` of the figures are then none.

    Args:
        names, place, shape, rounds, tell: as of `servers`.
        rate: requests a second.
        seconds: for which they come.
    """

    def once(url: str, n: int, turn: int) -> Load:
        return open_loop(url, shape.requests(max(1, round(rate * seconds)), f"{turn} {rate}"), rate, turn)

    return list(_served(names, place, [0], once, rounds, tell))


def _served(
    names: Sequence[str],
    place: Place,
    clients: Sequence[int],
    once: Callable[[str, int, int], Load],
    rounds: int,
    tell: Tell,
) -> Iterator[Rates]:
    found: dict[tuple[str, int], list[Load]] = {(name, n): [] for n in clients for name in names}
    with ExitStack() as stack:
        children = {name: stack.enter_context(Child(name, place)) for name in names}
        for turn, (name, n) in turns(found, rounds, warm_up=True):
            load = once(children[name].told["url"], n, turn)
            if turn >= 0:
                found[name, n].append(load)
                tell(f"round {turn + 1}, {n or 'random'} clients: {name} {load.rate:,.0f} tokens/s")
    for (name, n), loads in found.items():
        first = [load.first for load in loads if load.first is not None]
        yield Rates(name, n, [load.rate for load in loads], first)
