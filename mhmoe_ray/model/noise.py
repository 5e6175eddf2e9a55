"""Randomness in training as a pure function of (seed, micro-batch, layer): the same on any number of ranks."""

import hashlib

import torch


class Noise:
    """The random draws of one micro-batch's forward pass. Evaluation has none: there, no Noise is given."""

    def __init__(self, seed: int, micro_batch: int) -> None:
        self._name = f"{seed}:{micro_batch}"

    def generator(self, layer: int, device: torch.device) -> torch.Generator:
        digest = hashlib.blake2b(f"{self._name}:{layer}".encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
