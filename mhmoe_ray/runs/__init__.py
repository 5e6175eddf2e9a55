"""The run directory: all that a run is, readable without a cluster; a folder here or on an object store.

<storage>/<name>-<6 hex>/
  spec.yaml          what was submitted, with absolute paths; where it computes, as the newest attempt was told
  run.json           id, and cluster, job and time of each attempt (a submit or a resume), or the time of an import
  events.jsonl       what happened: submitted, started, checkpoint, failed, finished ...
  metrics.jsonl      one line a step
  routing/           expert counts per layer, one file per checkpointed step
  tensorboard/       event files
  evaluations/       what `mhmoe eval` and `mhmoe routing` found, one file for each question
  tokenizer.json
  chat_template.jinja   how a conversation becomes a prompt; where somebody put one, or it was imported
  checkpoints/step_00000200.<n>/   weights/ optim/ manifest.json, by the n-th start of workers
  stop               present while somebody asks the run to stop
  ray/               Ray Train's own folder, never read by us

Beside runs there may be <storage>/sweeps/ (sweeps.py).

On an object store events.jsonl and metrics.jsonl are folders of pieces (jsonl.py).

An imported run (huggingface/) was never trained: it has run.json, events.jsonl, tokenizer.json, perhaps
chat_template.jinja, and one checkpoint, of step 0. It has no spec, because nobody wrote one.

    directory.py      where things lie in it, and how runs are made and found
    storage.py       writing files so that a reader sees the old one or the new one
    jsonl.py       append-only files of JSON lines
    jsonl.py     looks into them here and there
    directory.py    run.json: how often a run was begun, and by which jobs
    events.py      events.jsonl, and the state of a run, which follows from it
    metrics.py     names of the metrics, and their history
    metrics.py  what Prometheus hears of them
    metrics.py how evenly routes are spread over experts
    metrics.py      how a run went, from a few looks into that history
    checkpoint/manifest.py    a checkpoint's manifest, whose presence is the commit
    checkpoint/load.py     named tensors to and from a checkpoint
    checkpoint/format.py      slices of tensors in its files
    checkpoint/load.py       from a checkpoint to a model
    checkpoint/retention.py   which checkpoints stay
    sweeps.py      the directory of a sweep
"""
