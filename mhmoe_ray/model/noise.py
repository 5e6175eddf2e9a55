"""Randomness in training as a pure function of (seed, micro-batch, layer): the same on any number of ranks."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

EMBEDDING = -1
"""The embedding's place among the layers."""


def seeded_generator(name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """One that gives the same draws for the same name, in any process."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class Noise:
    """The random draws of one micro-batch's forward pass. Evaluation has none: there, no Noise is given."""

    def __init__(self, seed: int, micro_batch: int) -> None:
        self._name = f"{seed}:{micro_batch}"

    def generator(self, layer: int, device: torch.device) -> torch.Generator:
        return seeded_generator(f"{self._name}:{layer}", device)


def dropout(x: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """Zeros with probability `rate` and the rest divided by 1 - rate; x itself where there is no generator.

    Which entries are zero depends on the generator and the shape, not on the dtype.
    """
    if not rate or generator is None:
        return x
    kept = torch.rand(x.shape, device=x.device, generator=generator) >= rate
    return x * kept / (1 - rate)


@contextmanager
def default_draws_from(generator: torch.Generator | None) -> Iterator[None]:
    """Inside, operations that know only the default generator of the device continue the stream of `generator`, and
    the default generator's own is left as it was. Nothing without a generator.

    States live on the host, so a GPU is not waited for.
    """
    if generator is None:
        yield
        return
    device = generator.device
    default = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]
    saved = default.get_state()
    default.set_state(generator.get_state())
    try:
        yield
        generator.set_state(default.get_state())
    finally:
        default.set_state(saved)
