"""The `mhmoe` command: one file a verb, wired in app.py.

Modules here import neither torch nor ray when imported, so that `mhmoe --help` answers at once; verbs import what they
need when they run.
"""
