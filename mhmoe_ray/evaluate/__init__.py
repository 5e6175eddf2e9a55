"""What a checkpoint knows and where it sends its tokens: on held-out text, on any text, and on tasks.

    request.py      what is asked and the answer, with counts of routes
    score.py        what predicting a text cost: loss, perplexity, bits per byte
    measure.py      text as samples, and a model's losses and routes over them
    activation.py   what counts of routes say of the use of experts
    harness.py      the checkpoint as a model of EleutherAI's lm-eval (extra `eval`)
    answer.py       all that together, as a request asks
    job.py          has it computed on a cluster

Routing is dropless throughout, as in serving.
"""
