"""Tests of profiles: each operation of a step belongs to one part, forward, backward and recomputed."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import set_checkpoint_early_stop

from mhmoe_ray.bench.acceptance.step_work import StepAccounting
from mhmoe_ray.model.parts import MARK, observed_parts
from mhmoe_ray.planner import parts
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.profiles import newest_profile, read_profile, summarize
from mhmoe_ray.train import profile
from mhmoe_ray.train.profile import STEP, StepProfiler, attribute_events, host_events
from tests.support.ranks import run_ranks
from tests.support.specs import TINY, tiny_spec
from tests.train.jobs import build_trainer, rank_batches, train

COUNTED_OPERATIONS = {
    "mm", "addmm", "bmm", "embedding", "embedding_dense_backward", "nll_loss_forward", "nll_loss_backward", "topk",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward", "rsqrt",
}  # fmt: skip
BLOCK_PARTS = {"attention", "router", "experts", "projections", "shared expert", "norms", "other"}


class OperationCounter(StepAccounting):
    """Counter of operations by part, which finds the part of a backward's operation by autograd's present node."""

    def __init__(self, model):
        super().__init__(model)
        self.counts = Counter()

    def __enter__(self):
        # The base class would put operations on fake tensors in the place of some.
        return TorchDispatchMode.__enter__(self)

    def __exit__(self, *error):
        TorchDispatchMode.__exit__(self, *error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function._schema.name, self.part] += 1
        return function(*args, **(kwargs or {}))


def spec_with(**train):
    return tiny_spec(model={"moe": {**TINY["model"]["moe"], "d_shared": 16}}, train=train)


def profile_steps(run, trainer, steps):
    profiler = StepProfiler(run, trainer, 1)
    profiler.request(steps)
    for step in range(steps):
        profiler.begin_step()
        trainer.update(trainer.accumulate(rank_batches(trainer.spec, step, trainer)))
        profiler.end_step()
    assert not profiler.is_active
    profiler.close()


@pytest.mark.parametrize("recompute", ["experts", "exchange", "block"])
def test_each_operation_belongs_to_the_part_that_it_computes(tmp_path, monkeypatch, recompute):
    spec, results = spec_with(recompute=recompute), []
    by_part = profile.seconds_by_part
    monkeypatch.setattr(profile, "seconds_by_part", lambda *args: results.append(args[0]) or by_part(*args))
    run, trainer = RunDir(tmp_path), build_trainer(spec)
    # A recomputed forward ends within its last operation, which profiles have and dispatch modes do not see.
    with set_checkpoint_early_stop(False):
        profile_steps(run, trainer, 1)
    part_events = attribute_events(host_events(results[0].events()))
    [step] = [e.event for e in part_events if e.event.name == MARK + STEP]
    of_step = [e for e in part_events if step.start <= e.event.start < step.end]
    assert {e.part for e in of_step} <= {*parts.STEP_PARTS}
    assert sum(e.own_time for e in of_step) == step.end - step.start
    assert min(e.own_time for e in of_step) >= 0

    counted_trainer = build_trainer(spec)
    counter = OperationCounter(counted_trainer.model)
    with set_checkpoint_early_stop(False), counter, observed_parts(counted_trainer.model, counter):
        counted_trainer.update(counted_trainer.accumulate(rank_batches(spec, 0, counted_trainer)))
    names = {f"aten::{name}" for name in COUNTED_OPERATIONS}
    expected = {key: count for key, count in counter.counts.items() if key[0] in names}
    assert Counter((e.event.name, e.part) for e in of_step if e.event.name in names) == expected
    assert {part for _, part in expected} >= {f"blocks: {part}" for part in BLOCK_PARTS - {"other"}}
    assert all(map(torch.equal, trainer.model.state_dict().values(), counted_trainer.model.state_dict().values()))


def test_the_parts_of_a_profile_add_up_to_its_steps(tmp_path):
    run = RunDir(tmp_path)
    profile_steps(run, build_trainer(spec_with()), 2)
    name = newest_profile(run)
    assert name == "step_00000001.1"
    [rank_profile] = read_profile(run, name)
    assert (rank_profile.step, rank_profile.steps, rank_profile.ranks, rank_profile.device) == (1, 2, 1, "cpu")
    assert sum(rank_profile.parts.values()) == pytest.approx(rank_profile.seconds)
    assert rank_profile.parts.keys() >= {f"blocks: {part}" for part in BLOCK_PARTS} | {parts.LOSS, parts.UPDATE}


def weights_after_steps(spec, run_folder):
    """Return the local weights after two steps, which are profiled if there is a run folder."""
    trainer = build_trainer(spec)
    if run_folder:
        profile_steps(RunDir(run_folder), trainer, 2)
    else:
        train(spec, trainer, 2)
    return list(trainer.model.state_dict().values())


def test_ranks_write_their_profiles_and_compute_the_same(tmp_path):
    spec = tiny_spec(
        model={"moe": {**TINY["model"]["moe"], "d_shared": 16}}, cluster={"workers": 2, "ep": 2}, train={"steps": 2}
    )
    profiled, plain = (run_ranks(2, weights_after_steps, spec, folder) for folder in (tmp_path, None))
    for profiled_weights, plain_weights in zip(profiled, plain, strict=True):
        assert all(map(torch.equal, profiled_weights, plain_weights))
    rank_profiles = read_profile(RunDir(tmp_path), "step_00000001.1")
    assert [(p.rank, p.ranks) for p in rank_profiles] == [(0, 2), (1, 2)]
    for p in rank_profiles:
        assert sum(p.parts.values()) == pytest.approx(p.seconds)
        assert p.parts.keys() >= {parts.EXCHANGE, parts.SHARED_EXPERT, parts.REDUCTION}
    summary = summarize(rank_profiles)
    assert summary["step"]["slowest"] == max(p.seconds for p in rank_profiles)
    assert (tmp_path / "profiles/step_00000001.1/rank_1.trace.json.gz").stat().st_size
    [event] = events.read(RunDir(tmp_path))
    assert (event["event"], event["name"], event["ranks"]) == ("profile", "step_00000001.1", 2)


def test_a_profile_leaves_nothing_on_the_model(tmp_path):
    trainer = build_trainer(spec_with())
    profile_steps(RunDir(tmp_path), trainer, 1)
    assert "on_part" not in vars(trainer.model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in trainer.model.modules())


def test_a_profile_is_no_change_of_the_training_and_lies_within_it():
    assert spec_with(profile={"at": 3}).changed_keys(spec_with()) == []
    with pytest.raises(ValueError, match="after the last of 20 steps"):
        spec_with(profile={"at": 21})
