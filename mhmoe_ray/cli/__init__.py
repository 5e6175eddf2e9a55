"""The `mhmoe` command: a file for each noun that a user types, wired in app.py, and what commands share.

    app.py         wires the commands; errors become one line and an exit code
    common.py      options and their completion, consoles, reading specs and checkpoints, numbers and tables
    verbs.py       hints for commands that are not there
    jobs.py        the cluster a command runs on, and following its jobs
    submit.py      start a run            follow.py     follow it to its end
    runs.py        list, resume, stop, rm
    status.py      how a run goes         logs.py       what it wrote
    plan.py, plan_tables.py                 what a spec means
    plan_placement.py, plan_estimate.py     where ranks will be; on paper
    presets.py     models by name         schema.py     what a spec may hold
    data.py        sample text, prepare   data_mix.py   the mixture that training reads
    data_inspect.py, data_inspect_view.py   what is in raw text, and what is wrong with it
    serve.py, serve_choice.py               answers over HTTP
    generate.py    answers without a server
    ckpt.py        checkpoints, to and from other tools' folders
    eval.py        what a checkpoint knows            routing.py    where its tokens go
    sweep.py       many runs as one       report.py     runs beside each other
    bench.py, bench_layer.py, bench_serve.py, bench_tables.py   measurements
    cluster.py     the local cluster, names for others, doctor

Modules here import neither torch nor ray when imported, so that `mhmoe --help` answers at once; commands import what
they need when they run.
"""
