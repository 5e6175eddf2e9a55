"""Randomness in training, which depends only on the seed, the micro-batch and the layer, not on the number of ranks."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

EMBEDDING = -1  # layer number of the embedding in `Noise.generator`
HEADS = -2  # layer number of the output heads in `Noise.generator`


def seeded_generator(name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new random generator, with the same numbers for a `name` in every process."""
    # Python's own hash of a string differs between processes.
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class Noise:
    """Source of random generators for a micro-batch in training; evaluation has none."""

    def __init__(self, seed: int, micro_batch: int) -> None:
        self._name = f"{seed}:{micro_batch}"

    def generator(self, layer: int, device: torch.device) -> torch.Generator:
        """Return a generator for a layer, in the same state at each call."""
        return seeded_generator(f"{self._name}:{layer}", device)


def dropout(x: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """Return x with entries zeroed with probability `rate`, others divided by 1 - rate; x itself without generator."""
    if not rate or generator is None:
        return x
    # The mask is drawn in float32, so that it does not depend on the dtype of x.
    keep_mask = torch.rand(x.shape, device=x.device, generator=generator) >= rate
    return x * keep_mask / (1 - rate)


@contextmanager
def default_generator_from(generator: torch.Generator | None) -> Iterator[None]:
    """Let operations in the context draw from `generator`, even those that only use the device's default one.
    Afterwards `generator` has advanced, and the default state is as before; None changes nothing."""
    # The state of a generator is on the host even if its device is a GPU, so copying the state does not wait for the
    # GPU.
    if generator is None:
        yield
        return
    device = generator.device
    default_generator = (
        torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]
    )
    previous_state = default_generator.get_state()
    default_generator.set_state(generator.get_state())
    try:
        yield
        generator.set_state(default_generator.get_state())
    finally:
        default_generator.set_state(previous_state)
