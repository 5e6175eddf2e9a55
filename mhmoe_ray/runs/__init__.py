"""The run directory: all that a run is, readable without a cluster.

<storage>/<name>-<6 hex>/
  spec.yaml          what was submitted, with absolute paths
  run.json           id, and cluster, job and time of each attempt (a submit or a resume)
  events.jsonl       what happened: submitted, started, checkpoint, failed, finished ...
  metrics.jsonl      one line a step
  routing/           expert counts per layer, one file per checkpointed step
  tokenizer.json
  checkpoints/step_00000200.<n>/   weights/ optim/ manifest.json, by the n-th start of workers
  stop               present while somebody asks the run to stop
  ray/               Ray Train's own folder, never read by us
"""
