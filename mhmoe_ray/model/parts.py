"""Observation of the parts of a training step (planner/parts.py) while a profile or a count runs; it costs nothing
else."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from torch import nn
from torch.autograd import profiler

from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.planner.parts import BLOCKS, EMBEDDING, LOSS, MODULE_PARTS

MARK = "mhmoe: "
"""Start of the names of ranges in a profile that name a part."""


def mark(part: str) -> AbstractContextManager[Any]:
    """Return a context whose operations belong to `part` in a profile, if one runs."""
    return profiler.record_function(MARK + part) if profiler._is_profiler_enabled else nullcontext()


class PartObserver(Protocol):
    """Observer of the parts of a step."""

    def begin_part(self, part: str) -> None:
        """Begin a part; the part that began before ends."""

    def enter_module(self, part: str) -> None:
        """Begin a part within the present one; a recomputed forward does so within a backward."""

    def leave_module(self) -> None:
        """End the part of the newest `enter_module`."""


def part_names(model: Trunk) -> dict[str, str]:
    """Return the part of each module that is one, by the module's name; compiled blocks have no modules."""
    names = {name: MODULE_PARTS.get(name.rpartition(".")[2]) for name, _ in model.named_modules()}
    names |= {f"blocks.{i}": BLOCKS for i in range(len(model.blocks))}
    return {name: part for name, part in names.items() if part and not (model.is_compiled and "blocks." in name)}


@contextmanager
def observed_parts(model: Trunk, observer: PartObserver) -> Iterator[None]:
    """Return a context in which a model and its trainer report each part to an observer."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    model.on_part = observer.begin_part
    handles = [model.register_forward_pre_hook(lambda *_: observer.begin_part(EMBEDDING))]
    handles += [n.register_forward_pre_hook(lambda *_: observer.begin_part(LOSS)) for n in model.final_norms()]
    for name, part in part_names(model).items():
        handles.append(modules[name].register_forward_pre_hook(lambda *_, part=part: observer.enter_module(part)))
        # A recomputed forward ends with an exception as soon as it has all that the backward needs.
        handles.append(modules[name].register_forward_hook(lambda *_: observer.leave_module(), always_call=True))
    try:
        yield
    finally:
        del model.on_part
        for handle in handles:
            handle.remove()
