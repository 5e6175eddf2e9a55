"""The `mhmoe` command: a file for each noun that a user types, wired in app.py, and what commands share.

    common.py                 options, consoles, reading specs and checkpoints, numbers and tables, shell completion
    jobs.py                   the cluster a command runs on, and modules of ours as jobs of it
    submit.py follow.py       start a run and follow it
    runs.py status.py logs.py what exists, how it goes, what it wrote; stop, resume, remove
    plan*.py presets.py       what a spec means, before anything starts
    data*.py                  sample text, prepare, inspect, lint, mix
    serve.py generate.py      answers over HTTP, and without a server
    ckpt.py eval.py routing.py report.py sweep.py bench*.py cluster.py

Modules here import neither torch nor ray when imported, so that `mhmoe --help` answers at once; commands import what
they need when they run.
"""
