"""Strategies (`cluster.strategy`) for the parameters that all ranks need, and for the reduction of gradients.

    ddp.py    every rank has all of these parameters, and DDP averages their gradients (ddp, and a single worker)
    fsdp.py   each rank has a shard of every tensor, by FSDP2 (fsdp); optionally also of experts
    zero.py   DeepSpeed's ZeRO (zero1, zero2, zero3; optional dependency `deepspeed`)
    gradients.py   the reduction of experts' gradients during the last backward, and clipping

Under every strategy, experts stay distributed by expert parallelism. A rank's experts compute on rows of all ranks of
its group, so their gradients are summed over dp and divided by dp * ep.
"""
