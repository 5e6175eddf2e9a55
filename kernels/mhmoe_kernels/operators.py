"""Kernels as operators of torch, `torch.ops.mhmoe.*`.

torch.compile and fake tensors ask an operator's fake implementation for the shapes of its results, so its work may
depend on values, as in a loop over experts and their rows.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

LIBRARY = torch.library.Library("mhmoe", "DEF")  # type: ignore[no-untyped-call]  # torch has no types for it


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that turns a function into an operator of torch, which has no backward.

    `schema` is in torch's notation; results must not share memory with arguments. `fake` returns uninitialized results
    for the same arguments.
    """

    def define(function: Callable[..., Any]) -> Any:
        name = schema.partition("(")[0]
        LIBRARY.define(schema)  # type: ignore[no-untyped-call]
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(name, function, device)  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"mhmoe::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.mhmoe, name).default

    return define


def compiled_operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator like `operator` that calls the function directly outside of torch.compile.

    Profilers and torch's dispatch modes then see the operations in it.
    """

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        defined_operator = operator(schema, fake)(function)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            return (defined_operator if torch.compiler.is_compiling() else function)(*arguments)

        return call

    return define
