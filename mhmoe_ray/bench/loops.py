"""Training of a run's model in a loop without Ray, on samples that are read beforehand: ours, and transformers'.

Both begin with the run's initial weights and use its samples and its optimizer settings, so their losses differ by
rounding only. With experts they differ a little more, because transformers balances the load over all layers together.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mhmoe_ray.bench.peers import PEERS, installed_version, unavailable_reason
from mhmoe_ray.bench.processes import Measurement
from mhmoe_ray.checkpoint.huggingface.adapters import choose_adapter
from mhmoe_ray.checkpoint.huggingface.config import SECTION, build_config
from mhmoe_ray.checkpoint.huggingface.names import tensor_entries
from mhmoe_ray.data.samples import TrainingSamples
from mhmoe_ray.data.shards.columns import ModelSamples, to_model_samples
from mhmoe_ray.data.shards.manifest import TOKENIZER_FILE, require_data_manifest
from mhmoe_ray.data.tokenizer import boundaries, load_tokenizer
from mhmoe_ray.distributed.mesh import build_mesh
from mhmoe_ray.distributed.optimizer import set_learning_rate
from mhmoe_ray.errors import SpecError
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.train.objectives.next_token import micro_batch
from mhmoe_ray.train.step import Trainer

WARM_UP_STEPS = 10
"""Number of steps that are not timed: the first steps wait for the stream and for the compilation of kernels."""
UNCOUNTED = -100
"""Target that torch's cross-entropy leaves out."""


def measure_loop(spec: RunSpec, _folder: Path, threads: int) -> dict[str, Any]:
    """Train the spec by our `Trainer`."""
    torch.set_num_threads(threads)
    trainer, device = _build_trainer(spec), _device(spec)

    def run_step(step_samples: list[ModelSamples]) -> float:
        sums = trainer.accumulate([micro_batch(samples, device) for samples in step_samples])
        trainer.update(sums)
        return sums.loss / max(1, sums.targets)

    return _time_steps(spec, run_step)


def measure_eager(spec: RunSpec, _folder: Path, threads: int) -> dict[str, Any]:
    """Train transformers' model, whose experts run one after another."""
    return _measure_transformers(spec, threads, "eager")


def measure_grouped_mm(spec: RunSpec, _folder: Path, threads: int) -> dict[str, Any]:
    """Train transformers' model, whose experts run in grouped products."""
    return _measure_transformers(spec, threads, "grouped_mm")


def transformers_measurements(spec: RunSpec) -> Mapping[str, Measurement]:
    """Return the measurements of transformers' model of a spec by name; a SpecError if it is missing or has none."""
    if reason := unavailable_reason(PEERS[0], installed_version("transformers"), _device(spec)):
        raise SpecError("bench run", reason, "or leave out --peers")
    model = spec.model
    differs = model.is_random or model.document_masks or (model.moe is not None and model.moe.capacity_factor)
    if differs or choose_adapter(model, spec.data.seq_len).model_type == SECTION:
        reason = "transformers trains no model of the spec's options and sizes"
        raise SpecError("bench run", reason, "leave out --peers, or name a spec such as a Llama or Mixtral")
    if model.moe is None:
        return {"transformers": measure_eager}
    return {"transformers eager": measure_eager, "transformers grouped_mm": measure_grouped_mm}


def _measure_transformers(spec: RunSpec, threads: int, implementation: str) -> dict[str, Any]:
    torch.set_num_threads(threads)
    train, device = spec.train, _device(spec)
    model = _build_transformers_model(spec, implementation).to(device).train()
    kinds = [[p for p in model.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False)]
    groups = [{"params": kinds[0], "weight_decay": train.weight_decay}, {"params": kinds[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)
    rates = (train.learning_rate(step) for step in range(1, train.steps + 1))

    def run_step(step_samples: list[ModelSamples]) -> float:
        targets, loss_sum = int(sum(samples.target_mask.sum() for samples in step_samples)), torch.zeros(())
        for samples in step_samples:
            token_BT, counts_BT = (torch.from_numpy(array).to(device) for array in samples[:2])
            target_BT = token_BT[:, 1:].masked_fill(~counts_BT, UNCOUNTED)
            with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bfloat16"):
                output = model(
                    token_BT[:, :-1],
                    labels=target_BT,
                    shift_labels=target_BT,
                    num_items_in_batch=targets / len(step_samples),
                    use_cache=False,
                )
            (output.loss / len(step_samples)).backward()
            # The loss of a mixture of experts includes the load balancing loss, which the loss of a run does not.
            balance = model.config.router_aux_loss_coef * output.aux_loss if spec.model.moe else 0.0
            loss_sum = loss_sum + (output.loss - balance).detach() / len(step_samples)
        nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        set_learning_rate(optimizer, next(rates))
        optimizer.step()
        optimizer.zero_grad()
        return float(loss_sum)

    return _time_steps(spec, run_step)


def _build_transformers_model(spec: RunSpec, implementation: str) -> Any:
    """Return transformers' model with the run's initial weights."""
    import transformers

    adapter, model = choose_adapter(spec.model, spec.data.seq_len), _build_trainer(spec).model
    tensors, entries = model.named_tensors(), tensor_entries(spec.model, adapter.name_replacements)
    state = {name: t for group in entries for e in group for name, t in e.split(tensors[e.checkpoint_name]).items()}
    config = transformers.AutoConfig.for_model(**build_config(spec.model, spec.data.seq_len, spec.model.vocab_size))
    config.output_router_logits = spec.model.moe is not None
    return getattr(transformers, adapter.class_name).from_pretrained(
        None, config=config, state_dict=state, experts_implementation=implementation, dtype=torch.float32
    )


def _build_trainer(spec: RunSpec) -> Trainer:
    device = _device(spec)
    inputs = boundaries(load_tokenizer(spec.data.prepared / TOKENIZER_FILE, spec.model.vocab_size))
    return Trainer(spec, build_mesh(spec.cluster, ["here"], device.type), device, inputs)


def _device(spec: RunSpec) -> torch.device:
    return torch.device("cuda" if spec.cluster.gpus_per_worker else "cpu")


def _time_steps(spec: RunSpec, run_step: Callable[[list[ModelSamples]], float]) -> dict[str, Any]:
    """Run the steps of a spec; `run_step` returns the loss of one. Return the seconds without the first steps, and the
    last loss."""
    token_bytes = require_data_manifest(spec.data.prepared).token_bytes
    positions = np.arange(spec.train.steps * spec.samples_per_step).reshape(spec.train.steps, -1)
    samples, loss = TrainingSamples.open_cached(spec), 0.0
    steps = [
        [to_model_samples(rows, token_bytes) for rows in np.split(samples.read(row), spec.train.micro_batches)]
        for row in positions
    ]
    for number, step_samples in enumerate(steps):
        if number == WARM_UP_STEPS:
            start_time = time.perf_counter()
        loss = run_step(step_samples)
    return {"seconds": time.perf_counter() - start_time, "loss": loss}
