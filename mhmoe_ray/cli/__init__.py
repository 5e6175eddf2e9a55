"""The `mhmoe` command: a file for each verb or group of verbs, wired in app.py, data.py and bench.py, and what they
share.

Modules here import neither torch nor ray when imported, so that `mhmoe --help` answers at once; verbs import what they
need when they run.
"""
