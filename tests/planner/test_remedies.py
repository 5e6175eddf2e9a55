"""Tests of the remedies for a lack of memory: changes of spec keys that lower the memory of a rank."""

from pathlib import Path

from mhmoe_ray.planner.memory import compute_memory
from mhmoe_ray.planner.remedies import memory_remedies
from mhmoe_ray.spec import load_resolved_spec

QWEN = Path(__file__).parents[2] / "jobs/scale/qwen3-30b.yaml"
PLAIN = ["train.recompute=none", "train.loss_chunk_rows=null", "cluster.gather_precision=float32"]


def test_each_remedy_saves_what_it_says_and_the_largest_comes_first():
    spec = load_resolved_spec(QWEN, PLAIN)
    remedies = memory_remedies(spec)
    assert [r.saved_bytes for r in remedies] == sorted((r.saved_bytes for r in remedies), reverse=True)
    assert {str(remedy) for remedy in remedies} >= {
        "train.recompute=block",
        "train.loss_chunk_rows=128",
        "cluster.gather_precision=bfloat16",
        "train.moment_precision=bfloat16",
    }
    total = compute_memory(spec).total
    for remedy in remedies:
        changed_spec = load_resolved_spec(QWEN, [*PLAIN, *(f"{key}={value}" for key, value in remedy.keys.items())])
        assert total - compute_memory(changed_spec).total == remedy.saved_bytes > 0


def test_remedies_that_are_impossible_or_in_use_are_left_out():
    """Gathers in bfloat16 are for fsdp, and a micro-batch of one sample cannot be smaller."""
    replicated = [*PLAIN, "cluster.strategy=ddp", "cluster.shard_experts=false"]
    spec = load_resolved_spec(QWEN, replicated)
    names = {str(remedy) for remedy in memory_remedies(spec)}
    assert "cluster.strategy=fsdp, cluster.shard_experts=true" in names
    assert not any("gather_precision" in name or "micro_batch_size" in name for name in names)
    halved = memory_remedies(load_resolved_spec(QWEN, [*replicated, "train.micro_batch_size=4"]))
    assert "train.micro_batch_size=2, train.micro_batches=16" in {str(remedy) for remedy in halved}
    assert "train.recompute=block" not in {str(remedy) for remedy in memory_remedies(load_resolved_spec(QWEN))}
