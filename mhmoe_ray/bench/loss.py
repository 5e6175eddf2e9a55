"""Time and peak memory of the output layer with its loss, for all logits at once and chunk by chunk."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from mhmoe_ray.bench.measure import peak_bytes
from mhmoe_ray.bench.timing import Hardware, Timing, device_clock, time_interleaved
from mhmoe_ray.model.autocast import DTYPES
from mhmoe_ray.model.loss import Targets, chunked_loss, full_loss
from mhmoe_ray.spec.base import Precision

ALL_LOGITS = "all logits"


class OutputLayerSize(NamedTuple):
    """Sizes of the output layer: tokens of a micro-batch, entries of the vocabulary, and width of the model."""

    tokens: int = 2048
    vocab_size: int = 32768
    d_model: int = 512


class LossFigures(NamedTuple):
    """Measurements of one way to compute the loss, and their ratios to those of computing all logits at once."""

    name: str
    timing: Timing
    """Seconds of a forward and a backward in each round."""
    peak_bytes: int
    """Largest number of bytes allocated at one time, without weights and inputs."""
    loss: float
    """Mean loss of a token in nats."""
    time_ratio: float
    memory_ratio: float

    def as_json(self) -> dict[str, Any]:
        """Return the measurements as `mhmoe bench loss --json` prints them."""
        return {**self._asdict(), "timing": self.timing.seconds}


def measure(
    size: OutputLayerSize, chunk_rows: Sequence[int], precision: Precision, rounds: int, hardware: Hardware
) -> list[LossFigures]:
    """Measure the loss with all logits at once and with each number of rows in a chunk, in interleaved rounds."""
    device = hardware.device
    generator = torch.Generator().manual_seed(0)
    x_BTM = torch.randn(1, size.tokens, size.d_model, generator=generator).to(device).requires_grad_()
    weight_VM = torch.randn(size.vocab_size, size.d_model, generator=generator).mul_(0.02).to(device).requires_grad_()
    token_BT = torch.randint(size.vocab_size, (1, size.tokens), generator=generator).to(device)
    targets = Targets(token_BT, torch.ones_like(token_BT, dtype=torch.bool))

    def run(rows: int | None) -> float:
        with torch.autocast(device.type, DTYPES[precision], enabled=precision == "bfloat16"):
            loss = (
                full_loss(F.linear(x_BTM, weight_VM), targets)
                if rows is None
                else chunked_loss(x_BTM, weight_VM, targets, rows)
            )
        torch.autograd.grad(loss.sum, (x_BTM, weight_VM))
        return float(loss.sum.detach()) / size.tokens

    variants = {ALL_LOGITS: partial(run, None), **{f"{rows} rows": partial(run, rows) for rows in chunk_rows}}
    losses = {name: variant() for name, variant in variants.items()}
    peaks = {name: peak_bytes(variant, device) for name, variant in variants.items()}
    timings = time_interleaved({**variants}, rounds, device_clock(device))
    base_seconds, base_peak = timings[ALL_LOGITS].median, peaks[ALL_LOGITS]
    return [
        LossFigures(name, timing, peaks[name], losses[name], timing.median / base_seconds, peaks[name] / base_peak)
        for name, timing in timings.items()
    ]
