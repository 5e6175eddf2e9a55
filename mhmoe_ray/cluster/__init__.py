"""How the command line talks to Ray: over HTTP, with a token. Only doctor.py imports torch when imported, none ray.

connect.py       which cluster a command speaks to, and named clusters
tokens.py        the folder with this user's state, and Ray's tokens in it
local.py         a Ray cluster of our own on this machine
spawn.py         its `ray start`, and which processes belong to it
dashboard.py     requests to a Ray dashboard, and retries while it is busy
nodes.py         the nodes of a cluster, what is free on them, what their processes wrote
jobs.py          Ray jobs: submit, look at, follow and stop them; what travels with one
remote.py        requests as such jobs, and their results
runs.py          attempts of runs: start one, how it stands, all that `mhmoe status` tells
serving.py       Ray Serve applications: deploy and look at them
serve_removal.py take them away
serve_client.py  the client of the configuration that all of them share
doctor.py        what `mhmoe doctor` looks at
"""
