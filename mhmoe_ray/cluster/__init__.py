"""How the command line talks to Ray: over HTTP, with a token. Nothing here but doctor/ imports ray or
torch when imported.

connect.py       which cluster a command speaks to, and with whose token
connect.py      clusters that the user has given names to
tokens.py        Ray's tokens: one of our own for clusters that we start, the user's for all others
connect.py          the folder with our state of this user
local.py         a Ray cluster of our own on this machine
spawn.py         the `ray start` of it
spawn.py     whose process is it?
nodes.py         the nodes of a cluster and what is free on them
dashboard.py     one GET from a Ray dashboard, with every way it can go wrong
dashboard.py   what Ray's HTTP clients raise, as our errors
jobs.py          Ray jobs: submit, look at, follow and stop them
dashboard.py      questions that a busy cluster may leave unanswered for a while
jobs.py      what travels to a cluster with a job
runs.py     starting an attempt of a run
runs.py   how a run stands, from its directory and its job together
runs.py    all that `mhmoe status` tells of a run
nodes.py          what single processes of a cluster wrote
serving.py       Ray Serve applications: deploy and look at them
serve_removal.py take them away
serve_client.py  Ray's client for the configuration that all of them share
doctor/          what `mhmoe doctor` looks at
"""
