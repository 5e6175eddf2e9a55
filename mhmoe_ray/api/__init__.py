"""The Python interface: what `import mhmoe_ray` offers, over which the command line works too.

    defaults.py       defaults that functions of the interface and commands share
    spec.py           load a spec
    plan.py           the figures of a plan
    placement.py      the nodes that a run's ranks would be on
    run.py            runs: submit, find, watch, stop, resume, evaluate, export and remove them
    attempts.py       start, resume, stop and follow the attempts of a run
    connection.py     the cluster that a job goes to, and checks before it starts there
    logs.py           the log lines of a run
    checkpoints.py    the checkpoints of a run
    evaluation.py     the quality of a checkpoint
    model.py          a model in this process: generate text, compute logits
    model_source.py   a stored model that is not loaded yet
    generation.py     checks of prompts, sampling and stop texts
    engine_thread.py  the engine of such a model, and its answers
    service.py        a model that a cluster serves
    serve_target.py   the checkpoint, settings and API keys that are served

README.md walks through the interface. Importing a module loads neither torch nor ray; functions load what they need.
"""
