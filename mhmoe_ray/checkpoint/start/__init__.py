"""Runs that start from the weights of other models (the `start` section of a spec).

    source.py          the models that `start.from` names: runs, checkpoints, folders, models of the hub
    compatibility.py   checks that a run can start from its models: sizes, options, tokenizers
    resolve.py         load a spec whose `start` gives the defaults of its model, sequence length and tokenizer
    record.py          the record of the models that gave the weights, and of the samples that they have read
    transform.py       weights of one layer: copied, upcycled or mixed
    write.py           the checkpoint of step 0

A command resolves the spec and checks the start before it submits a job. The job checks again, writes the checkpoint of
step 0 into the run directory, and trains from it as from any other checkpoint. So a run needs its ancestors, the models
that gave its weights, only until its first checkpoint exists.

Only transform.py and write.py need torch.
"""
