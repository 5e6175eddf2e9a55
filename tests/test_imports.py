"""Tests that processes do not import large modules that they do not need.

Torch takes two seconds and hundreds of megabytes, DTensor half a second.
"""

import subprocess
import sys
from pathlib import Path

JOBS_AND_ACTORS = (
    "mhmoe_ray.data.inspect.job",
    "mhmoe_ray.data.prepare.job",
    "mhmoe_ray.data.stream",
    "mhmoe_ray.evaluate.job",
    "mhmoe_ray.serving.app",
    "mhmoe_ray.serving.batch.job",
    "mhmoe_ray.serving.batch.pipeline",
    "mhmoe_ray.sweep.job",
    "mhmoe_ray.train.driver",
    "mhmoe_ray.train.repetition",
    "mhmoe_ray.train.stream_start",
    "mhmoe_ray.train.watchdog",
)

READING_MODULES = (
    "mhmoe_ray.report.page",
    "mhmoe_ray.report.variants",
    "mhmoe_ray.evaluate.activation",
    "mhmoe_ray.cli.routing",
)
SERVING_MODULES = (
    "mhmoe_ray.serving.engine.torch_engine",
    "mhmoe_ray.checkpoint.load",
    "mhmoe_ray.checkpoint.huggingface.export",
)


def assert_not_imported(unwanted_module: str, names: tuple[str, ...]) -> None:
    """Assert that importing the modules `names` in a new process does not import `unwanted_module`."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[2:]:\n"
        "    importlib.import_module(name)\n"
        "    assert sys.argv[1] not in sys.modules, name"
    )
    subprocess.run([sys.executable, "-c", code, unwanted_module, *names], check=True)


def test_jobs_and_actors_that_compute_nothing_do_not_import_torch():
    assert_not_imported("torch", JOBS_AND_ACTORS)


def test_modules_that_read_and_draw_runs_do_not_import_torch():
    assert_not_imported("torch", READING_MODULES)


def test_the_package_imports_no_large_module_before_it_is_used():
    for unwanted_module in ("torch", "ray", "pydantic"):
        assert_not_imported(unwanted_module, ("mhmoe_ray", "mhmoe_ray.cli.app"))


def test_names_of_the_package_import_neither_torch_nor_ray():
    code = "import sys\nfrom mhmoe_ray import *\nprint({'torch', 'ray'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "set()\n"


def test_modules_that_serve_or_export_do_not_import_dtensor():
    assert_not_imported("torch.distributed.tensor", SERVING_MODULES)


def test_small_corpus_can_be_imported_without_lxml():
    code = "import sys; sys.modules['lxml'] = None; import mhmoe_ray.corpus.small"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_reading_a_spec_imports_few_of_our_modules():
    """A spec without `start` needs neither checkpoints nor runs."""
    code = (
        "import sys, mhmoe_ray as mh\n"
        "mh.load_spec('jobs/quickstart.yaml')\n"
        "print(sum(name.partition('.')[0].startswith('mhmoe') for name in sys.modules))"
    )
    root = Path(__file__).parent.parent
    process = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(process.stdout) <= 49


def test_a_step_of_a_single_worker_imports_no_compiler():
    """Torch's compiler and DTensor take over a second of the time to the first step."""
    code = (
        "import sys, torch, mhmoe_ray.train.worker\n"
        "from mhmoe_ray.distributed.optimizer import build_optimizer\n"
        "from mhmoe_ray.model.build import build_model\n"
        "from tests.support.specs import tiny_spec\n"
        "spec = tiny_spec()\n"
        "model = build_model(spec.model)\n"
        "optimizer = build_optimizer(model, spec.train)\n"
        "model(torch.ones(1, 2, dtype=int)).logits_BTV.sum().backward()\n"
        "optimizer.step()\n"
        "optimizer.zero_grad()\n"
        "print({'torch._dynamo', 'torch.distributed.tensor'} & set(sys.modules))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "set()\n"
