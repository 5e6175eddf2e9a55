"""Comparison of engines or servers in interleaved rounds; each round has new prompts, the same for all.

A warm-up round before them is not counted.
"""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from mhmoe_ray.bench.serve.child import Child
from mhmoe_ray.bench.serve.engines import ContestModel, Prompt
from mhmoe_ray.bench.serve.load import closed_loop, open_loop
from mhmoe_ray.bench.serve.model import VOCAB_SIZE
from mhmoe_ray.bench.timing import measure_rounds

PACKAGES = {
    "vllm": "vllm",
    "vLLM offline": "vllm",
    "transformers": "transformers",
    "vllm, alone": "vllm",
    "vllm, Ray Serve": "vllm",
    "vLLM's server": "vllm",
}
"""Package that an engine or server needs in addition to mhmoe_ray."""


class TextLengths(NamedTuple):
    """Lengths of prompts and answers in tokens. Unless `is_equal`, lengths vary from 1/4 to 7/4 of these."""

    prompt: int
    tokens: int
    is_equal: bool = True

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens of a prompt and its answer together."""
        return sum(mean if self.is_equal else _length_range(mean)[1] for mean in (self.prompt, self.tokens))

    def requests(self, count: int, seed: str) -> list[Prompt]:
        """Return `count` random prompts with the lengths of their answers; each seed gives different prompts."""
        generator = random.Random(seed)

        def length(mean: int) -> int:
            return mean if self.is_equal else generator.randint(*_length_range(mean))

        # Prompts do not contain token 0, because it is the end of the text.
        return [
            ([generator.randrange(1, VOCAB_SIZE) for _ in range(length(self.prompt))], length(self.tokens))
            for _ in range(count)
        ]


def _length_range(mean: int) -> tuple[int, int]:
    # The limits of random lengths are 1/4 and 7/4 of the mean, so that their average is the mean.
    return max(1, mean // 4), max(1, mean * 7 // 4)


class Rates(NamedTuple):
    """Throughput of one engine or server with one number of clients; lists have one value per round."""

    name: str
    clients: int
    rates: list[float]
    """Tokens of answers (or of prompts, see `Contest.measure_engines`) per second."""
    first_token_seconds: list[float]
    """Median seconds until the first token; empty if answers are not streamed."""

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def ratio_to(self, reference: "Rates") -> float:
        """Return the median over rounds of the ratio of this rate to the rate of `reference`."""
        return statistics.median(a / b for a, b in zip(self.rates, reference.rates, strict=True))

    def as_json(self) -> dict[str, Any]:
        """Return the measurements as `mhmoe bench serve --json` prints them."""
        fields = self._asdict()
        return {"first": fields.pop("first_token_seconds"), **fields, "rate": self.rate}


class Contest(NamedTuple):
    """Comparison of engines or servers with the same prompts; its methods raise a JobError for a contestant that fails.

    Each contestant has a process of its own, which waits while others are measured.
    """

    shape: TextLengths
    clients: Sequence[int]
    """Numbers of clients at a time, with each of which all contestants are measured."""
    rounds: int
    report: Callable[[str], None]

    def measure_engines(self, engines: Mapping[str, tuple[str, ContestModel]]) -> list[Rates]:
        """Measure engines, given with their models by a unique title.

        A round has four times as many requests as the engine answers at a time. Throughput counts the tokens of
        answers, but those of prompts if answers have only one token.
        """

        def run_round(child: Child, n: int, number: int) -> tuple[float, None]:
            prompts = self.shape.requests(4 * n, f"{number} {n}")
            token_count = sum(tokens if self.shape.tokens > 1 else len(ids) for ids, tokens in prompts)
            return token_count / child.time_answers(prompts, n), None

        return self._measure(engines, self.clients, run_round, "at a time")

    def measure_servers(self, names: Sequence[str], served_model: ContestModel, stream: bool) -> list[Rates]:
        """Measure servers; a client sends its next request when it has the answer to the last one."""

        def run_round(child: Child, n: int, number: int) -> tuple[float, float | None]:
            # Each client sends three requests, or more if there are few clients, so that a round has at least eight
            # requests.
            prompts = self.shape.requests(n * max(3, 8 // n), f"{number} {n} {stream}")
            load = closed_loop(child.ready_message["url"], prompts, n, stream)
            return load.rate, load.first_token_seconds

        return self._measure({name: (name, served_model) for name in names}, self.clients, run_round, "clients")

    def measure_random_arrivals(
        self, names: Sequence[str], served_model: ContestModel, rate: float, seconds: float
    ) -> list[Rates]:
        """Measure servers under streamed requests that arrive at random times, on average `rate` per second.

        The field `clients` of the results is 0, because there is no fixed number of clients.
        """

        def run_round(child: Child, _: int, number: int) -> tuple[float, float | None]:
            prompts = self.shape.requests(max(1, round(rate * seconds)), f"{number} {rate}")
            load = open_loop(child.ready_message["url"], prompts, rate, number)
            return load.rate, load.first_token_seconds

        return self._measure({name: (name, served_model) for name in names}, [0], run_round, "clients")

    def _measure(
        self,
        contestants: Mapping[str, tuple[str, ContestModel]],
        clients: Sequence[int],
        run_round: Callable[[Child, int, int], tuple[float, float | None]],
        unit: str,
    ) -> list[Rates]:
        """Measure contestants; `run_round(child, clients, round)` returns their rate and a first token's seconds."""

        def measure_case(case: tuple[str, int], number: int) -> tuple[float, float | None]:
            title, n = case
            rate, first_token_seconds = run_round(children[title], n, number)
            if number >= 0:
                self.report(f"round {number + 1}, {n or 'random'} {unit}: {title} {rate:,.0f} tokens/s")
            return rate, first_token_seconds

        with ExitStack() as stack:
            children = {
                title: stack.enter_context(Child(name, served_model))
                for title, (name, served_model) in contestants.items()
            }
            cases = [(title, n) for n in clients for title in contestants]
            results = measure_rounds(cases, self.rounds, measure_case, warm_up=True)
        return [
            Rates(title, n, [rate for rate, _ in pairs], [seconds for _, seconds in pairs if seconds is not None])
            for (title, n), pairs in results.items()
        ]
