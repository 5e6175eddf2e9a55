"""Comparison of engines or servers in interleaved rounds; each round has new prompts, the same for all.

A warm-up round before them is not counted.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from mhmoe_ray.bench.serve.child import Child
from mhmoe_ray.bench.serve.engines import Prompt, ServedModel
from mhmoe_ray.bench.serve.load import Load, closed_loop, open_loop
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

Report = Callable[[str], None]


class Shape(NamedTuple):
    """Lengths of prompts and answers in tokens. Unless `is_equal`, lengths vary from 1/4 to 7/4 of these."""

    prompt: int
    tokens: int
    is_equal: bool = True

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens of a prompt and its answer together."""
        return (
            self.prompt + self.tokens
            if self.is_equal
            else self._max_length(self.prompt) + self._max_length(self.tokens)
        )

    @staticmethod
    def _max_length(mean: int) -> int:
        return max(1, mean * 7 // 4)

    def requests(self, count: int, seed: str) -> list[Prompt]:
        """Return `count` random prompts with the lengths of their answers; each seed gives different prompts."""
        generator = random.Random(seed)

        # Random lengths are between 1/4 and 7/4 of the mean, so that their average is the mean.
        def length(mean: int) -> int:
            return mean if self.is_equal else generator.randint(max(1, mean // 4), self._max_length(mean))

        # Prompts do not contain token 0, because it is the end of the text.
        return [
            ([generator.randrange(1, VOCAB_SIZE) for _ in range(length(self.prompt))], length(self.tokens))
            for _ in range(count)
        ]


class Rates(NamedTuple):
    """Throughput of one engine or server with one number of clients; lists have one value per round."""

    name: str
    clients: int
    rates: list[float]
    """Tokens of answers (or of prompts, see `measure_engines`) per second."""
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


def measure_engines(
    served_models: Mapping[str, tuple[str, ServedModel]],
    shape: Shape,
    clients: Sequence[int],
    rounds: int,
    report: Report,
) -> list[Rates]:
    """Measure the throughput of engines, given with their models by a unique title, with several numbers of requests.

    A round has four times as many requests as the engine answers at a time. Throughput counts the tokens of answers,
    but those of prompts if answers have only one token. An engine that fails is a JobError.
    """

    def measure_rate(case: tuple[str, int], number: int) -> float:
        name, n = case
        prompts = shape.requests(4 * n, f"{number} {n}")
        token_count = sum(tokens if shape.tokens > 1 else len(ids) for ids, tokens in prompts)
        rate = token_count / children[name].time_answers(prompts, n)
        if number >= 0:
            report(f"round {number + 1}, {n} at a time: {name} {rate:,.0f} tokens/s")
        return rate

    with ExitStack() as stack:
        children = {
            name: stack.enter_context(Child(engine, served_model))
            for name, (engine, served_model) in served_models.items()
        }
        cases = [(name, n) for n in clients for name in served_models]
        rates = measure_rounds(cases, rounds, measure_rate, warm_up=True)
    return [Rates(name, n, model_rates, []) for (name, n), model_rates in rates.items()]


def measure_servers(
    names: Sequence[str],
    served_model: ServedModel,
    shape: Shape,
    clients: Sequence[int],
    stream: bool,
    rounds: int,
    report: Report,
) -> list[Rates]:
    """Measure servers with several numbers of clients.

    A client sends its next request when it has the answer to the last one.
    """

    def run_round(url: str, n: int, turn: int) -> Load:
        # Each client sends three requests, or more if there are few clients, so that a round has at least eight
        # requests.
        return closed_loop(url, shape.requests(n * max(3, 8 // n), f"{turn} {n} {stream}"), n, stream)

    return list(_measure_loads(names, served_model, clients, run_round, rounds, report))


def measure_random_arrivals(
    names: Sequence[str],
    served_model: ServedModel,
    shape: Shape,
    rate: float,
    seconds: float,
    rounds: int,
    report: Report,
) -> list[Rates]:
    """Measure the throughput of servers under streamed requests that arrive at random times.

    On average, `rate` requests per second arrive over `seconds`. The field `clients` of the results is 0, because there
    is no fixed number of clients.
    """

    def run_round(url: str, n: int, turn: int) -> Load:
        return open_loop(url, shape.requests(max(1, round(rate * seconds)), f"{turn} {rate}"), rate, turn)

    return list(_measure_loads(names, served_model, [0], run_round, rounds, report))


def _measure_loads(
    names: Sequence[str],
    served_model: ServedModel,
    clients: Sequence[int],
    run_round: Callable[[str, int, int], Load],
    rounds: int,
    report: Report,
) -> Iterator[Rates]:
    """Measure servers in interleaved rounds; `run_round(url, clients, round)` sends the requests of one round."""

    def measure_load(case: tuple[str, int], number: int) -> Load:
        name, n = case
        load = run_round(children[name].ready_message["url"], n, number)
        if number >= 0:
            report(f"round {number + 1}, {n or 'random'} clients: {name} {load.rate:,.0f} tokens/s")
        return load

    with ExitStack() as stack:
        children = {name: stack.enter_context(Child(name, served_model)) for name in names}
        cases = [(name, n) for n in clients for name in names]
        loads_by_case = measure_rounds(cases, rounds, measure_load, warm_up=True)
    for (name, n), loads in loads_by_case.items():
        first_token_seconds = [load.first_token_seconds for load in loads if load.first_token_seconds is not None]
        yield Rates(name, n, [load.rate for load in loads], first_token_seconds)
