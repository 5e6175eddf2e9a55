"""Modules that processes do without: torch takes two seconds and hundreds of megabytes, DTensor half a second."""

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

READING = (
    "mhmoe_ray.report.page",
    "mhmoe_ray.report.variants",
    "mhmoe_ray.evaluate.activation",
    "mhmoe_ray.cli.routing",
)
SERVING = (
    "mhmoe_ray.serve.engine.torch_engine",
    "mhmoe_ray.checkpoint.load",
    "mhmoe_ray.checkpoint.huggingface.export",
)


def assert_goes_without(unwanted: str, names: tuple[str, ...]) -> None:
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[2:]:\n"
        "    importlib.import_module(name)\n"
        "    assert sys.argv[1] not in sys.modules, name"
    )
    subprocess.run([sys.executable, "-c", code, unwanted, *names], check=True)


def test_jobs_and_actors_that_compute_nothing_have_no_torch():
    assert_goes_without("torch", JOBS_AND_ACTORS)


def test_what_reads_runs_and_draws_them_has_no_torch():
    assert_goes_without("torch", READING)


def test_what_serves_or_exports_a_model_has_nothing_of_distributed_tensors():
    assert_goes_without("torch.distributed.tensor", SERVING)


def test_the_small_sample_needs_no_extra():
    code = "import sys; sys.modules['lxml'] = None; import mhmoe_ray.corpus.small"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
