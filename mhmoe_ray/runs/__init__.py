"""Run directory: all files of a run, readable without a cluster, in a local folder or on an object store.

<storage>/<name>-<6 hex>/
  spec.yaml          the submitted spec, with absolute paths; its cluster section is that of the newest attempt
  run.json           id, and cluster, job and time of the first attempt (a submit), or the time of an import
  attempts/          a file for each later attempt (a resume), with all attempts up to it
  events.jsonl       events: submitted, started, checkpoint, failed, finished ...
  metrics.jsonl      one line per step
  logs/              logs of jobs and workers of the newest attempts, limited in size and without secrets (logs.py)
  routing/           route counts per layer and expert, one file per checkpointed step
  stacks/            Python stacks of all ranks, one file for each time that the watchdog killed ranks that hung
  profiles/          profiles of steps, a folder for each (profiles.py)
  tensorboard/       event files
  evaluations/       results of `mhmoe eval` and `mhmoe routing`, one file for each request
  tokenizer.json
  classes.json       names of the classes of each task; in runs of vision models only, in place of tokenizer.json
  start.json         models that the run started from, with their own ancestors; absent if its first weights were random
  chat_template.jinja   template of prompts; present if the run trains on conversations, if a user added it, or if the
                        model that it was imported or started from has one
  checkpoints/step_00000200.<n>/   weights/ optim/ manifest.json, written by the n-th worker group (`checkpoint/`)
  stop               present while a user asks the run to stop
  profile.json       present while a user asks for a profile of the next steps
  ray/               Ray Train's own folder, which this package never reads

A worker group is the set of a run's workers from one start or restart of the workers to the next. On an object store,
events.jsonl and metrics.jsonl are folders of segments (jsonl.py). An imported run (checkpoint/huggingface/) has
run.json, events.jsonl, tokenizer.json, perhaps chat_template.jinja, and one checkpoint, of step 0, but no spec. The
storage folder also holds the directories of sweeps, <storage>/sweeps/ (sweeps.py).

    directory.py   paths in the run directory, functions that create and find runs, and attempts
    start.py       start.json
    events.py      events.jsonl, and the state of a run, which follows from it
    metrics.py     the registry of metrics: one entry for each
    history.py     metrics.jsonl, and queries on it
    logs.py        logs that outlive the cluster
    profiles.py    times of the parts of profiled steps
    jsonl.py       append-only files of JSON lines
    sweeps.py      the directory of a sweep
"""
