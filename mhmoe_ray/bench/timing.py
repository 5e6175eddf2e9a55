"""Timing cases against each other: all of them in each round, so that what the machine does besides hits all alike."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

Case = TypeVar("Case")


class Timing(NamedTuple):
    seconds: list[float]
    """One for each round."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleaved(
    cases: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: bool = True,
) -> dict[str, Timing]:
    """Time each case once a round, every other round in reverse order.

    Args:
        cases: what to time, by name.
        rounds: that are counted.
        clock: seconds; on a GPU one that waits for it.
        warm_up: a first round that is not counted; not needed for cases that have run before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn, name in turns(cases, rounds, warm_up):
        start = clock()
        cases[name]()
        if turn >= 0:
            seconds[name].append(clock() - start)
    return {name: Timing(found) for name, found in seconds.items()}


def turns(cases: Iterable[Case], rounds: int, warm_up: bool = False) -> Iterator[tuple[int, Case]]:
    """Every case once a round with the round's number, from 0; every other round in reverse order.

    Args:
        cases: in the order of the first round.
        rounds: that are counted.
        warm_up: a round -1 before them.
    """
    order = list(cases)
    for turn in range(-1 if warm_up else 0, rounds):
        for case in order:
            yield turn, case
        order.reverse()
