"""Modules that run as jobs of a cluster."""

import secrets
from pathlib import Path

from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import connect


def run_on_cluster(cluster, *args, expected_status="SUCCEEDED", **env):
    """Run a module of our working directory as a job of the cluster, and return the lines that it prints.

    Assert that the job ends with `expected_status`. `env` has further environment variables of the job.
    """
    connection, job = connect(cluster.address), f"test-{secrets.token_hex(4)}"
    environment = {"env_vars": {"PYTHONPATH": str(Path.cwd()), **env}}
    jobs.submit(connection, jobs.job_request(["-m", *map(str, args)], job, local=True, runtime_env=environment))
    lines = list(jobs.follow_logs(connection, job))
    assert jobs.info(connection, job).status == expected_status, "\n".join(lines)
    return lines
