"""The Python interface, which `import mhmoe_ray` offers and on which the command line is built.

    defaults.py       defaults that functions of the interface and commands share
    spec.py           load a spec
    plan.py           the plan of a run: sizes, memory, traffic and times before it starts
    model_plan.py     the cost of a model of the hub: training, upcycling, serving
    search.py         the fastest settings that fit a cluster, by estimate
    placement.py      the nodes on which a run's ranks would be
    run.py            runs: submit, find, watch, stop, resume, evaluate, export and remove them
    served_routes.py  compare the experts that a server reports with those of a checkpoint
    adapters.py       find the adapters that a server answers with beside a model
    attempts.py       start, stop and follow the attempts of a run, each of which is one job
    repetition.py     a check that a run can be resumed, by repeating its last steps
    connection.py     the connection to the cluster for a job, and checks before the job starts
    logs.py           the log lines of a run
    checkpoints.py    the checkpoints of a run
    evaluation.py     the quality of a checkpoint
    profile.py        profiles of the steps of a run
    documents.py      the documents of a step, and the steps of a document
    survey.py         a survey of raw text
    text_folder.py    a spec for the text in a folder
    model.py          a model in this process: generate text, compute logits
    model_source.py   a stored model that is not loaded yet
    generation.py     checks of prompts, sampling and stop texts
    engine_thread.py  the engine of a model in this process, and its answers
    service.py        a model that a cluster serves
    serve_target.py   the checkpoint to serve, with its settings and API keys
    trust.py          settings of runs that somebody else may have written

README.md walks through the interface. Importing a module loads neither torch nor ray; functions load what they need.
"""
