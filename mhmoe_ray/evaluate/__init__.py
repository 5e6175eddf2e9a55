"""Evaluation of a checkpoint: its losses and its routing on held-out text, on any other text, and on tasks.

    request.py      the request, the evaluation that answers it, and counts of routes
    score.py        how well a text was predicted: loss, perplexity, bits per byte
    measure.py      text as samples, and a model's losses and routes over them
    activation.py   figures on the use of experts, from counts of routes
    harness.py      the checkpoint as a model of EleutherAI's lm-eval (extra `eval`)
    answer.py       computes everything that a request asks for
    job.py          the Ray job that computes it on a cluster

Routing is dropless throughout, as in serving.
"""
