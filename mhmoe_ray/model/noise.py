"""Randomness in training as a pure function of (seed, micro-batch, layer): the same on any number of ranks."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

EMBEDDING = -1
"""Layer number of the embedding's random draws."""


def seeded_generator(name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a random generator that gives the same draws for the same name, in any process."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class Noise:
    """The random draws of one micro-batch's forward pass. Evaluation has no randomness and passes no `Noise`."""

    def __init__(self, seed: int, micro_batch: int) -> None:
        self._name = f"{seed}:{micro_batch}"

    def generator(self, layer: int, device: torch.device) -> torch.Generator:
        return seeded_generator(f"{self._name}:{layer}", device)


def dropout(x: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """Set entries of x to zero with probability `rate` and divide the rest by 1 - rate; without a generator or a rate,
    return x itself.

    Which entries become zero depends on the generator and the shape, not on the dtype.
    """
    if not rate or generator is None:
        return x
    kept = torch.rand(x.shape, device=x.device, generator=generator) >= rate
    return x * kept / (1 - rate)


@contextmanager
def default_draws_from(generator: torch.Generator | None) -> Iterator[None]:
    """Let operations that use only the device's default generator draw from the stream of `generator` inside the
    context.

    Afterwards `generator` has advanced and the default generator has its earlier state again. Without a generator the
    context does nothing. Generator states are stored on the host, so this does not wait for a GPU.
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
