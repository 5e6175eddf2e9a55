"""Recomputation of parts of a model in the backward, and values that a recomputed forward takes from the first one."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

R = TypeVar("R")


def recompute_in_backward(function: Callable[..., R], *inputs: Tensor) -> R:
    """Return `function(*inputs)`; the backward calls it again instead of keeping its values."""
    # torch.compile takes no contexts of this kind. `recall` is not called in the parts of a block that it compiles.
    options: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": _recall_contexts}
    # The state of torch's default generator need not be kept, because all random numbers are drawn from other
    # generators.
    result: R = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
    return result


def recall(compute: Callable[[], R]) -> R:
    """Return `compute()`; in a forward that `recompute_in_backward` repeats, what it returned the first time.

    The calls must have the same order each time. The values live as long as the first forward's graph, to which they
    must not refer.
    """
    context = _context.get()
    return compute() if context is None else context.recall(compute)


class _RecallContext:
    """Context of a forward, or of its repetitions in the backward."""

    def __init__(self, values: list[Any], repeats: bool) -> None:
        self._values, self._repeats = values, repeats

    def __enter__(self) -> None:
        # A graph of which parts are traversed apart repeats a forward several times.
        self._recalled = iter(self._values)
        self._token = _context.set(self)

    def __exit__(self, *_: object) -> None:
        _context.reset(self._token)

    def recall(self, compute: Callable[[], R]) -> R:
        value: R = next(self._recalled) if self._repeats else compute()
        if not self._repeats:
            self._values.append(value)
        return value


# A backward may run in a thread of autograd, which has a context of its own.
_context: ContextVar[_RecallContext | None] = ContextVar("_context", default=None)


def _recall_contexts() -> tuple[_RecallContext, _RecallContext]:
    values: list[Any] = []
    return _RecallContext(values, False), _RecallContext(values, True)
