"""What processes go without: torch takes two seconds and hundreds of megabytes."""

import subprocess
import sys

JOBS_AND_ACTORS = (
    "mhmoe_ray.data.inspect.job",
    "mhmoe_ray.data.prepare.job",
    "mhmoe_ray.data.stream",
    "mhmoe_ray.evaluate.job",
    "mhmoe_ray.serve.app",
    "mhmoe_ray.sweep.job",
    "mhmoe_ray.train.stream_start",
    "mhmoe_ray.train.watchdog",
)


def test_jobs_and_actors_that_compute_nothing_have_no_torch():
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name"
    )
    subprocess.run([sys.executable, "-c", code, *JOBS_AND_ACTORS], check=True)
