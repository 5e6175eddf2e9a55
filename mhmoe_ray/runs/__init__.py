"""The run directory: all that a run is, readable without a cluster; a folder here or on an object store.

<storage>/<name>-<6 hex>/
  spec.yaml          what was submitted, with absolute paths; where it computes, as the newest attempt was told
  run.json           id, and cluster, job and time of each attempt (a submit or a resume), or the time of an import
  events.jsonl       what happened: submitted, started, checkpoint, failed, finished ...
  metrics.jsonl      one line a step
  logs/              what jobs and workers of the newest attempts wrote, bounded and without secrets (logs.py)
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

An imported run (checkpoint/huggingface/) was never trained: it has run.json, events.jsonl, tokenizer.json, perhaps
chat_template.jinja, and one checkpoint, of step 0. It has no spec, because nobody wrote one.

    directory.py   where things lie in it, how runs are made and found, and run.json
    events.py      events.jsonl, and the state of a run, which follows from it
    metrics.py     the registry of metrics: one entry for each
    history.py     metrics.jsonl, and looks into it
    logs.py        logs that outlive the cluster
    jsonl.py       append-only files of JSON lines
    sweeps.py      the directory of a sweep

Checkpoints are `checkpoint/`'s.
"""
