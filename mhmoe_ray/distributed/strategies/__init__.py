"""How ranks hold the parameters that they all have, and how gradients become whole: `cluster.strategy`.

    ddp.py    every rank has them all; DDP averages their gradients (ddp, and a single worker)
    fsdp.py   each rank has a slice of every tensor, by FSDP2 (fsdp); on request also of experts
    zero.py   DeepSpeed's ZeRO (zero1, zero2, zero3; extra `deepspeed`)

Experts are spread by expert parallelism in all of them: a rank's experts got rows of all ranks of its group, so their
gradients are summed over dp and divided by dp * ep, where all others are averaged over dp * ep.
"""
