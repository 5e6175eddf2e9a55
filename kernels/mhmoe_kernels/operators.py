"""Kernels as operators of torch, `torch.ops.mhmoe.*`.

torch.compile and fake tensors do not look into an operator: they ask its fake implementation for the shapes of its
results. They can therefore handle code whose work depends on values, such as a loop over experts and their rows.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

LIBRARY = torch.library.Library("mhmoe", "DEF")  # type: ignore[no-untyped-call]  # torch has no types for it


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that turns a function into an operator of torch, which has no backward.

    Args:
        schema: name, arguments and results in torch's notation. Results must not share memory with arguments.
        fake: function of the same arguments that returns uninitialized results of the right shapes.
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
    """Return a decorator like that of `operator`, but the function is an operator only in code that is compiled.

    Without torch.compile, the function is called directly, so that profilers and torch's dispatch modes see the
    operations in it.
    """

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        defined_operator = operator(schema, fake)(function)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            return (defined_operator if torch.compiler.is_compiling() else function)(*arguments)

        return call

    return define
