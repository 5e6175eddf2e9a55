"""How ranks hold the parameters that all of them have, and how gradients are reduced: `cluster.strategy`.

    ddp.py    every rank has them all; DDP averages their gradients (ddp, and a single worker)
    fsdp.py   each rank has a shard of every tensor, by FSDP2 (fsdp); on request also of experts
    zero.py   DeepSpeed's ZeRO (zero1, zero2, zero3; extra `deepspeed`)

Every strategy leaves experts spread by expert parallelism. A rank's experts get rows of all ranks of its group, so
their gradients are summed over dp and divided by dp * ep, where all others are averaged over dp * ep.
"""
