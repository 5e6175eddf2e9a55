"""Kernels as operators of torch, `torch.ops.mhmoe.*`.

torch.compile and fake tensors cannot look into an operator: they ask its fake implementation for the shapes of its
results. So they pass through code whose work depends on values, such as the loop over experts and their rows.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

LIBRARY = torch.library.Library("mhmoe", "DEF")  # type: ignore[no-untyped-call]  # torch has no types for it


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that makes a function an operator without a backward, and returns this operator.

    Args:
        schema: name, arguments and results as torch writes them. Results must not share memory with arguments.
        fake: function that returns empty results for the same arguments.
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
    """Return the decorator of `operator` for a function that is an operator in compiled code only.

    Elsewhere it is called directly, so that profilers and torch's dispatch modes see the operations in it.
    """

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        defined_operator = operator(schema, fake)(function)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            return (defined_operator if torch.compiler.is_compiling() else function)(*arguments)

        return call

    return define
