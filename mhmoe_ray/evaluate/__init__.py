"""What a checkpoint knows and where it sends its tokens: on held-out text, on any text, and on tasks.

    request.py      what is asked, and the answer
    measure.py      text as samples of a model's length, domain by domain
    request.py        loss, perplexity, bits per byte
    request.py       which experts tokens go to
    measure.py      counts that as the model computes
    activation.py   what such counts say of the use of experts
    measure.py      losses and routes of a checkpoint
    harness.py      the checkpoint as a model of EleutherAI's lm-eval (extra `eval`)
    answer.py       all that together, as a request asks
    job.py          has it computed on a cluster

Routing is dropless throughout, as in serving.
"""

SAYS = "eval: "
"""Begins the job's own lines."""
CAN_GROW = "MHMOE_CAN_GROW"
"""Variable of the job: 0 where no node will join its cluster, else 1."""
