"""Interleaved rounds of all contestants, each round on prompts that are the same for all and new in that round."""

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
"""Package that a contestant needs beside ours; contestants that are not listed need none."""

Tell = Callable[[str], None]


class Shape(NamedTuple):
    """Lengths of requests."""

    prompt: int
    tokens: int
    """Number of tokens of an answer, on average."""
    equal: bool = True
    """Whether all prompts and answers have these lengths; otherwise lengths vary from 1/4 to 7/4 of them."""

    @property
    def longest(self) -> int:
        """Largest number of tokens of a prompt and its answer together."""
        return self.prompt + self.tokens if self.equal else self._most(self.prompt) + self._most(self.tokens)

    @staticmethod
    def _most(mean: int) -> int:
        return max(1, mean * 7 // 4)

    def requests(self, count: int, seed: str) -> list[Prompt]:
        """Return random requests, which differ from those of every other seed."""
        draws = random.Random(seed)

        def length(mean: int) -> int:
            return mean if self.equal else draws.randint(max(1, mean // 4), self._most(mean))

        return [
            ([draws.randrange(1, VOCAB) for _ in range(length(self.prompt))], length(self.tokens)) for _ in range(count)
        ]


class Rates(NamedTuple):
    """Measurements of one contestant at one number of clients."""

    name: str
    clients: int
    rates: list[float]
    """Tokens per second, one value per round."""
    first: list[float]
    """Median seconds until the first token, one value per round; empty if answers are not streamed."""

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def to(self, reference: "Rates") -> float:
        """Return the median over rounds of the ratio of its rate to another's."""
        return statistics.median(a / b for a, b in zip(self.rates, reference.rates, strict=True))

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "rate": self.rate}


def engines(
    places: Mapping[str, tuple[str, Place]], shape: Shape, clients: Sequence[int], rounds: int, tell: Tell
) -> list[Rates]:
    """Measure engines with each number of requests at a time, on four times as many requests.

    Args:
        places: by a unique name, the engine of each contestant and the model that it serves.
        shape: the lengths of requests; if answers have one token, the tokens of prompts are counted.
        clients: the numbers of requests at a time.
        rounds: the number of rounds of all contestants, every other one in reverse order; a warm-up round before them
            is not counted.
        tell: a function that is called with a line after each measurement.

    Raises:
        JobError: one of the contestants failed.
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
    """Measure servers with each number of clients, each of which sends its next request when it has its answer.

    Args:
        names: keys of `SERVERS`.
        place: the model that is served.
        shape: the lengths of requests.
        clients: the numbers of clients.
        stream: whether answers are streamed token by token.
        rounds: the number of rounds, as in `engines`.
        tell: a function that is called with a line after each measurement, as in `engines`.
    """

    def once(url: str, n: int, turn: int) -> Load:
        return closed_loop(url, shape.requests(n * max(3, 8 // n), f"{turn} {n} {stream}"), n, stream)

    return list(_served(names, place, clients, once, rounds, tell))


def by_chance(
    names: Sequence[str], place: Place, shape: Shape, rate: float, seconds: float, rounds: int, tell: Tell
) -> list[Rates]:
    """Measure servers under requests that arrive at random and are streamed; `clients` of the figures is then 0.

    Args:
        names: keys of `SERVERS`.
        place: the model that is served.
        shape: the lengths of requests.
        rate: the average number of requests per second.
        seconds: the average time over which all requests arrive.
        rounds: the number of rounds, as in `engines`.
        tell: a function that is called with a line after each measurement, as in `engines`.
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
