"""All GPUs of a node: the exchange of rows, parallelism strategies, a model like Qwen3-30B, and a killed worker.

Each strategy trains in processes of its own, one rank for each GPU.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mhmoe_ray.bench.acceptance.defaults import measure_workers
from mhmoe_ray.bench.acceptance.ranks import run_ranks
from mhmoe_ray.bench.acceptance.settings import PartCase, Row, Rows, Settings, first_line
from mhmoe_ray.bench.acceptance.steps import make_spec
from mhmoe_ray.bench.acceptance.training import compared_models
from mhmoe_ray.bench.measure import peak_bytes
from mhmoe_ray.bench.steps import StepCase
from mhmoe_ray.bench.timing import device_clock, time_interleaved
from mhmoe_ray.distributed.dispatch.exchange import PendingExchange, RowExchange
from mhmoe_ray.spec import ClusterSpec, RunSpec
from mhmoe_ray.spec.load import load_resolved_spec

_SHARDED = {"strategy": "fsdp", "shard_experts": True}
_LARGE_SPEC = Path(__file__).parents[3] / "jobs/scale/qwen3-30b.yaml"
_TOY_MODEL = {"vocab_size": 64, "d_model": 32, "layers": 2, "attention_heads": 4, "kv_heads": 2, "d_head": 8}
_TOY_KEYS = [f"model.{key}={value}" for key, value in _TOY_MODEL.items()]
_TOY_KEYS += ["model.moe.experts=8", "model.moe.top_k=2", "model.moe.d_expert=16", "data.seq_len=8"]
_LOSS_TOLERANCE = 1e-2
"""Largest relative difference of losses in bfloat16 between two strategies in the third step."""


def cases(settings: Settings) -> Iterator[PartCase]:
    """Yield a case for the exchange, for each group of strategies that must have equal losses, for settings of workers,
    and for a killed worker.

    The large model keeps its experts in shards, or in one place each (`ep`).
    """
    _, models = next(iter(compared_models(settings).items()))
    model, large_model = models["MH-MoE h 2"], load_resolved_spec(_LARGE_SPEC, _TOY_KEYS if settings.is_toy else ())
    ep = {"ep": settings.gpus}
    hybrid = {**_SHARDED, "shard_group": max(1, settings.gpus // 2)}
    strategies: dict[str, dict[str, Any]] = {"ddp": {}, "ddp, ep": ep, "fsdp": _SHARDED, "hybrid": hybrid}
    gathers = {"strategy": "fsdp", "gather_precision": "bfloat16"}
    large_strategies = {"Qwen3-30B, fsdp": {**_SHARDED, **gathers}, "Qwen3-30B, fsdp, ep": {**gathers, **ep}}
    yield PartCase("exchange", partial(run_ranks, settings, _measure_exchange))
    yield PartCase("strategies", partial(_measure_strategies, settings, model, strategies))
    yield PartCase("Qwen3-30B", partial(_measure_strategies, settings, large_model, large_strategies))
    yield PartCase("workers", partial(measure_workers, settings))
    yield PartCase("killed worker", partial(_measure_killed_worker, settings))


def _measure_exchange(settings: Settings) -> Rows:
    """Measure the exchange of rows beside the backend's own all-to-all, with equal numbers of rows for all ranks."""
    world = dist.group.WORLD
    assert world is not None
    exchange = RowExchange(world)
    for count in (4,) if settings.is_toy else (256, 2048, 16384):
        shape = (settings.gpus, count, settings.layer_width)
        rows = torch.zeros(shape, dtype=torch.bfloat16, device=settings.torch_device)
        received, counts = torch.empty_like(rows), [count] * (settings.gpus - 1)
        others_rows, others_received = rows[1:].flatten(0, 1), received[1:].flatten(0, 1)
        start_exchange = partial(exchange.start_rows, others_rows, others_received, counts, counts)
        transfers: dict[str, Callable[[], object]] = {
            "GB/s": partial(_wait_for, start_exchange),
            "collective_GB/s": partial(dist.all_to_all_single, received, rows),
        }
        timings = time_interleaved(transfers, settings.rounds, device_clock(settings.torch_device))
        rates = {name: others_rows.nbytes / timing.median / 1e9 for name, timing in timings.items()}
        yield {"name": f"exchange of {count} rows with each rank", **rates}


def _wait_for(start_exchange: Callable[[], PendingExchange]) -> None:
    start_exchange().wait()


def _measure_strategies(settings: Settings, spec: RunSpec, strategies: dict[str, dict[str, Any]]) -> Rows:
    losses: dict[str, float] = {}
    for name, keys in strategies.items():
        cluster = {"workers": settings.gpus, "gpus_per_worker": int(settings.device == "cuda"), **keys}
        # Without a warm-up, the losses of later steps depend on the updates before them.
        train = spec.train.model_copy(update={"micro_batches": settings.gpus, "warmup_steps": 0})
        updates = {"cluster": ClusterSpec.model_validate(cluster), "train": train}
        try:
            [row] = run_ranks(settings, _train, spec.model_copy(update=updates))
        # A strategy that fails, such as for lack of memory, must not hide the results of the others.
        except Exception as error:
            yield {"name": name, "passed": False, "error": first_line(error)}
            continue
        losses[name] = row["loss"]
        passed = abs(row["loss"] / next(iter(losses.values())) - 1) <= _LOSS_TOLERANCE
        yield {"name": name, **row, "passed": passed}


def _train(settings: Settings, spec: RunSpec) -> Iterator[Row]:
    """Train three steps, and measure further ones, on each rank."""
    case = StepCase(spec, settings.torch_device)
    losses = torch.tensor([case.step() for _ in range(3)], dtype=torch.float64, device=settings.torch_device)
    dist.all_reduce(losses)
    peak = peak_bytes(case.step, settings.torch_device)
    timing = time_interleaved({"": case.step}, min(5, settings.rounds), device_clock(settings.torch_device))[""]
    rate = spec.tokens_per_step / timing.median / settings.gpus
    yield {"tokens/s_of_each_GPU": rate, "peak_gb": peak / 1e9, "loss": float(losses[-1])}


def _measure_killed_worker(settings: Settings) -> Rows:
    """Kill a worker of a run on Ray, which must be restarted and end with its last step."""
    if find_spec("ray") is None:
        yield {"name": "killed worker", "skipped": "not run: Ray is missing"}
        return
    from mhmoe_ray.bench.processes import run_in_process

    spec = make_spec("multi-head", "float32", is_toy=True)
    cluster = {"workers": settings.gpus, "gpus_per_worker": int(settings.device == "cuda"), "strategy": "fsdp"}
    steps = {"steps": 300, "micro_batches": settings.gpus, "checkpoint_every": 5}
    updates = {"cluster": ClusterSpec.model_validate(cluster), "train": spec.train.model_copy(update=steps)}
    # The tokenizer that the run trains has 257 entries at least.
    updates["model"] = spec.model.model_copy(update={"vocab_size": 320})
    result = run_in_process(train_with_kill, spec.model_copy(update=updates), settings.gpus, "killed worker")
    yield {"name": "killed worker", **result, "passed": result == {"starts": 2, "step": steps["steps"]}}


def train_with_kill(spec: RunSpec, folder: Path, _: int) -> dict[str, Any]:
    """Train a run on random words, kill its last worker after the first step, and return its starts and last step."""
    import ray

    from mhmoe_ray.runs import events, history, metrics
    from mhmoe_ray.runs.directory import AttemptId, create_run
    from mhmoe_ray.train.driver import train_run

    (folder / "raw").mkdir()
    texts = (" ".join(str(i * j % 97) for j in range(1, 200)) for i in range(1, 200))
    (folder / "raw" / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    source = spec.data.sources["none"].model_copy(update={"path": folder / "raw"})
    data = spec.data.model_copy(update={"sources": {"none": source}, "prepared": folder / "prepared"})
    ray.init("local", num_cpus=spec.cluster.cpus, log_to_driver=False, include_dashboard=False)
    run = create_run(spec.model_copy(update={"storage": folder / "runs", "data": data}))

    def kill_worker() -> None:
        while history.last_line(run) is None:
            time.sleep(0.1)
        os.kill(starts()[0]["workers"][-1]["pid"], signal.SIGKILL)

    def starts() -> list[dict[str, Any]]:
        return [event for event in events.read(run) if event["event"] == "started"]

    threading.Thread(target=kill_worker, daemon=True).start()
    train_run(run, AttemptId(1))
    return {"starts": len(starts()), "step": history.read(run)[-1][metrics.STEP]}
