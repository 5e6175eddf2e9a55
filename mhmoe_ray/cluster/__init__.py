"""Client side of Ray: the command line talks to clusters over HTTP, with a token.

Importing these modules does not import ray, and of them only doctor.py imports torch.

connect.py       choose the cluster and the token of a command; clusters that the user has named
submissions.py   the record of what this user has submitted, by which foreign run directories are recognized
tokens.py        the state folder of this user, and Ray's authentication tokens
local.py         the local cluster: a Ray cluster that this package starts on this machine
spawn.py         run `ray start` for the local cluster, and find the processes that belong to it
dashboard.py     requests to a Ray dashboard, and retries while it is busy
nodes.py         the nodes of a cluster, their free resources, and the logs of their processes
jobs.py          Ray jobs: submit, inspect, follow and stop them
packages.py      the files that are sent to a cluster with a job
remote.py        requests that run as Ray jobs, and their results
runs.py          attempts of runs: start one, its outcome, and everything that `mhmoe status` shows
serving.py       Ray Serve applications: deploy and inspect them
serve_removal.py remove Ray Serve applications
serve_client.py  client of the Serve configuration that all applications share
doctor.py        the checks of `mhmoe doctor`
"""
