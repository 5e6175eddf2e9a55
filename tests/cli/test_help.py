import json
import subprocess
import sys

import pytest

from tests.cli.run import mhmoe

COMMANDS = [
    "plan",
    "presets",
    "submit",
    "status",
    "list",
    "logs",
    "stop",
    "profile",
    "resume",
    "generate",
    "data",
    "serve",
    "ckpt",
    "bench",
    "cluster",
    "doctor",
    "rm",
    "eval",
    "routing",
    "report",
    "sweep",
]


def test_help_names_every_command_and_imports_neither_torch_nor_ray(tmp_path):
    code = (
        "import sys; sys.argv = ['mhmoe', '--help']\n"
        "from mhmoe_ray.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'ray', 'pyarrow', 'pandas', 'pydantic'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("set()\n")
    assert all(f"\n  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_command_has_a_help(tmp_path, verb):
    assert mhmoe(tmp_path, verb, "--help").out.startswith("Usage: ")


def test_dry_run_prints_the_request_and_starts_no_job(corpus):
    # The folder may already have runs, because other tests share it and start runs in it.
    previous_runs = sorted(corpus.glob("runs/*"))
    request = mhmoe(corpus, "submit", "spec.yaml", "--dry-run").json()
    assert "-m mhmoe_ray.train.job" in request["entrypoint"]
    assert sorted(corpus.glob("runs/*")) == previous_runs
    remote_request = mhmoe(corpus, "submit", "spec.yaml", "--dry-run", "--address", "http://head:8265").json()
    assert json.dumps(remote_request["runtime_env"]).count("mhmoe_") == 2
