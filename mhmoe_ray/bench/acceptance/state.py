"""Pause of training for a checkpoint or for `torch.save`, and throughput of forward passes in prefill and decode."""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from mhmoe_ray.bench.acceptance.settings import PartCase, Rows, Settings
from mhmoe_ray.bench.checkpoints import CheckpointCase
from mhmoe_ray.bench.steps import SMALL_SIZE, matched_models
from mhmoe_ray.bench.timing import device_clock, time_interleaved
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.serving.engine.torch_engine import convert_to_bfloat16
from mhmoe_ray.spec import RunSpec


def cases(settings: Settings) -> Iterator[PartCase]:
    """Yield two cases: the pause of a checkpoint, and tokens per second of forward passes over prompts and tokens."""
    size = SMALL_SIZE._replace(d_model=96, layers=2, seq_len=8, vocab_size=64, micro_batch_size=1, micro_batches=1)
    size = size if settings.is_toy else SMALL_SIZE._replace(d_model=768, layers=12)
    specs = matched_models(size, (2,))
    yield PartCase("checkpoint", partial(_measure_checkpoint, settings, specs["MH-MoE h 2"]))
    yield PartCase("forward passes", partial(_measure_passes, settings, specs))


def _measure_checkpoint(settings: Settings, spec: RunSpec) -> Rows:
    rounds = 1 if settings.is_toy else 5
    with tempfile.TemporaryDirectory() as folder:
        case = CheckpointCase(spec, Path(folder), settings.torch_device)
        pairs = [(case.time_checkpoint().pause, case.time_torch_save()) for _ in range(rounds + 1)]
        state_bytes = case.state_bytes
    # The first pair is a warm-up.
    pause, torch_save_seconds = (statistics.median(seconds) for seconds in zip(*pairs[1:], strict=True))
    yield {
        "name": "checkpoint",
        "pause_ms": pause * 1e3,
        "to_torch_save": pause / torch_save_seconds,
        "state_gb": state_bytes / 1e9,
    }


def _measure_passes(settings: Settings, specs: dict[str, RunSpec]) -> Rows:
    passes, token_counts = dict[str, Callable[[], object]](), dict[str, int]()
    for name, spec in specs.items():
        model = Decoder(spec.model)
        init_weights(model, 0)
        model = model.to(settings.torch_device).eval()
        # As in serving, weights are converted once, and not in each pass.
        convert_to_bfloat16(model)
        for phase, shape in {"prefill": (1, spec.data.seq_len), "decode": (32, 1)}.items():
            token_BT = torch.randint(spec.model.vocab_size, shape, device=settings.torch_device)
            title = f"{name}, {phase} of {shape[0]} x {shape[1]} tokens"
            passes[title], token_counts[title] = partial(model, token_BT), token_BT.numel()
    with torch.no_grad(), torch.autocast(settings.device, torch.bfloat16):
        timings = time_interleaved(passes, settings.rounds, device_clock(settings.torch_device))
    for title, timing in timings.items():
        yield {"name": title, "tokens/s": token_counts[title] / timing.median}
