import subprocess
import sys
from pathlib import Path

from mhmoe_ray.serve.config import application_config, failure_reason
from mhmoe_ray.spec import ServeSpec

# As Serve 2.60 reports a replica that cannot start, cut in the middle.
REPLICA_FAILURE = """The deployment failed to start 3 times in a row. See controller logs for details. Error:
\x1b[36mray::ServeReplica:tiny:completions.initialize_and_get_metadata()\x1b[39m (pid=16217, repr=<ServeReplica>)
  File "ray/serve/_private/replica.py", line 1928, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "mhmoe_ray/runs/tensors.py", line 46, in load_tensors
    raise CheckpointError(f"checkpoint {folder.parent}", why, "use the model section it was written by")
mhmoe_ray.errors.CheckpointError: checkpoint c: blocks.2.norm is not in it; use the model section it was written by
"""


def test_an_application_has_the_sizes_and_limits_of_the_spec():
    spec = ServeSpec(replicas=2, cpus_per_replica=3, max_tokens=100, max_concurrency=5)
    config = application_config("app", Path("/runs/a/checkpoints/step_00000001.1"), spec, "a")
    assert config["args"] == {"checkpoint": "/runs/a/checkpoints/step_00000001.1", "model": "a", "max_tokens": 100}
    (deployment,) = config["deployments"]
    assert deployment["num_replicas"] == 2
    assert deployment["ray_actor_options"] == {"num_cpus": 3}
    assert deployment["max_ongoing_requests"] == 5
    assert deployment["max_queued_requests"] == 40


def test_the_reason_of_a_replica_is_the_end_of_its_traceback():
    application = {
        "status": "DEPLOY_FAILED",
        "message": "Failed to update the deployments ['completions'].",
        "deployments": {"completions": {"status": "DEPLOY_FAILED", "message": REPLICA_FAILURE}},
    }
    expected = "checkpoint c: blocks.2.norm is not in it; use the model section it was written by"
    assert failure_reason(application) == expected


def test_the_reason_of_a_build_is_its_message():
    message = "Deploying app 'a' failed with exception:\ncheckpoint c: it is torn; use another checkpoint of the run"
    application = {"status": "DEPLOY_FAILED", "message": message, "deployments": {}}
    assert failure_reason(application) == "checkpoint c: it is torn; use another checkpoint of the run"


def test_the_command_line_can_use_it_without_torch_and_ray():
    code = "import sys, mhmoe_ray.serve.config; print({'torch', 'ray', 'fastapi'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
