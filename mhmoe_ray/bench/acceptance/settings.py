"""Sizes of an acceptance test, and the form of the results that its parts yield."""

import importlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mhmoe_ray.spec import MoESpec

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]
"""Result as a JSON object: `name` describes what was measured; other keys have the values."""
Rows = Iterator[Row]


class PartCase(NamedTuple):
    """Unit of a part, which is measured as a whole, and again if the part ended before it did."""

    name: str
    measure: Callable[[], Iterable[Row]]


class Settings(NamedTuple):
    """Device, folder and sizes of an acceptance test."""

    device: Literal["cuda", "cpu"]
    folder: Path
    is_toy: bool
    """True for sizes with which all parts together take minutes on a CPU."""
    gpus: int = 1
    """Number of ranks of the part `node`, one for each GPU."""
    is_compiling: bool = False
    """True if a case runs only so that its kernels are compiled; then it measures as little as it can."""

    @property
    def torch_device(self) -> "torch.device":
        # The process that runs the parts needs no torch, whose import may take as long as a short part.
        import torch

        return torch.device(self.device)

    @property
    def rounds(self) -> int:
        """Number of rounds over which the median of a measurement is taken."""
        return 1 if self.is_toy or self.is_compiling else 20

    @property
    def layer_width(self) -> int:
        return 16 if self.is_toy else 2048

    @property
    def layer_tokens(self) -> tuple[int, ...]:
        """Numbers of tokens with which layers are measured; the last number has predicted times."""
        return (8,) if self.is_toy else (8192, 32768)

    @property
    def layers(self) -> dict[str, MoESpec]:
        """Sizes of layers with equal multiply-adds and parameters, by name."""
        if self.is_toy:
            return {"SMoE": _layer(1, 4, 2, 16), "MH-MoE h 2": _layer(2, 4, 2, 16)}
        return {
            "SMoE": _layer(1, 64, 8, 1024),
            "MH-MoE h 2": _layer(2, 152, 8, 856),
            "MH-MoE h 4": _layer(4, 296, 8, 856),
        }


def _layer(heads: int, experts: int, top_k: int, d_expert: int) -> MoESpec:
    return MoESpec(heads=heads, experts=experts, top_k=top_k, d_expert=d_expert, every=1)


def part_cases(settings: Settings, part: str) -> list[PartCase]:
    """Return the cases of a part from its module."""
    # The part `sanitizer` runs checks of the module `correctness` under NVIDIA's compute-sanitizer.
    module_name = "correctness" if part == "sanitizer" else part
    module: Any = importlib.import_module(f"mhmoe_ray.bench.acceptance.{module_name}")
    return list(module.sanitizer_cases(settings) if part == "sanitizer" else module.cases(settings))


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of its message, cut to a length that a table can show."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
