"""How ranks hold the parameters that they all have, and how gradients become whole: `cluster.strategy`.

    replicated.py   every rank has them all; DDP averages their gradients (ddp, and a single worker)
    sharded.py      each rank has a slice of every tensor, by FSDP2 (fsdp); on request also of experts
    zero.py         DeepSpeed's ZeRO (zero1, zero2, zero3; extra `deepspeed`)
    build.py        from the spec's word to one of them

Experts are spread by expert parallelism in all of them: a rank's experts got rows of all ranks of its group, so their
gradients are summed over dp and divided by dp * ep, where all others are averaged over dp * ep.
"""

from mhmoe_ray.train.strategies.build import build_strategy
from mhmoe_ray.train.strategies.replicated import Strategy

__all__ = ["Strategy", "build_strategy"]
