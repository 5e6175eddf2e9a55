"""The `mhmoe` command, with one file for each noun that a user types, and helpers that commands share.

    app.py         registers the commands; turns errors into one line and an exit code
    options.py     arguments and options of several commands, and their completion
    output.py      consoles, lines about the present activity, tables and JSON
    formats.py     texts of metrics, counts, bytes and durations
    verbs.py       hints for unknown commands
    init.py        a spec for the text in a folder
    submit.py      start a run            follow.py     follow a run to its end
    runs.py        list, resume, stop, profile, track, rm
    status.py      state of a run         logs.py       logs of its job and workers
    plan_model.py                           cost of a model of the hub
    plan.py, plan_tables.py, plan_search.py sizes, memory, traffic and placement of a spec's run, and estimated times
    presets.py     models by name         schema.py     the JSON schema of specs
    data.py        write sample text, prepare text as shards
    data_documents.py   the documents of a step, and the steps of a document
    data_mix.py    how much training reads of each source of documents
    data_inspect.py, data_inspect_view.py   the contents of raw text, and problems in it
    serve.py       answers over HTTP
    generate.py, generate_batch.py          answers without a server, to a prompt or to all rows of a file
    chat.py        a conversation without a server
    ckpt.py        checkpoints, and conversion from and to other tools' formats
    eval.py      quality of a checkpoint   routing.py    its use of experts
    sweep.py, sweep_follow.py               many runs from one file
    report.py      comparison of runs
    bench.py, bench_layer.py, bench_serve.py, bench_tables.py   measurements of alternatives side by side
    cluster.py     the local cluster, names for other clusters, doctor

Commands parse arguments, call the Python interface (`mhmoe_ray/api`), print results and follow jobs. Modules here
import neither torch nor ray, so that `mhmoe --help` answers at once. Commands import what they need when they run.
"""
