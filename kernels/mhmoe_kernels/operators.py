"""Kernels as operators of torch, `torch.ops.mhmoe.*`.

torch.compile and fake tensors ask an operator's fake implementation for the shapes of its results, so its work may
depend on values, as in a loop over experts and their rows.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch

LIBRARY = torch.library.Library("mhmoe", "DEF")  # type: ignore[no-untyped-call]  # torch has no types for it
LAUNCHES: dict[str, int] = {}
"""Largest number of kernels that each operator of Triton kernels launches, which never depends on values."""


def operator(
    fake: Callable[..., Any], launches: int | None = None, changed_arguments: Iterable[str] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that turns a function into an operator of torch, which has no backward.

    The operator has the function's name, without a leading underscore. Its results must not share memory with its
    arguments. `fake` returns uninitialized results for the same arguments. `launches` is the entry of `LAUNCHES`.
    `changed_arguments` are the names of the tensors that the operator changes in place.
    """

    def define(function: Callable[..., Any]) -> Any:
        name = function.__name__.lstrip("_")
        if launches is not None:
            LAUNCHES[name] = launches
        # Kernels are compiled for their numbers, so these are constants (int) in compiled code and no symbols (SymInt).
        schema = torch.library.infer_schema(function, mutates_args=changed_arguments).replace("SymInt", "int")
        LIBRARY.define(name + schema)  # type: ignore[no-untyped-call]
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(name, function, device)  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"mhmoe::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.mhmoe, name).default

    return define


def compiled_operator(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator like `operator` that calls the function directly outside of torch.compile.

    Profilers and torch's dispatch modes then see the operations in it.
    """

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        defined_operator = operator(fake)(function)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            return (defined_operator if torch.compiler.is_compiling() else function)(*arguments)

        return call

    return define
