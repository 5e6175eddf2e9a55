import json
import subprocess
import sys

import pytest

from tests.cli.run import mhmoe

VERBS = [
    "plan",
    "presets",
    "submit",
    "status",
    "list",
    "logs",
    "stop",
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


def test_help_names_every_verb_and_imports_neither_torch_nor_ray(tmp_path):
    code = (
        "import sys; sys.argv = ['mhmoe', '--help']\n"
        "from mhmoe_ray.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'ray', 'pyarrow', 'pandas', 'pydantic'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("set()\n")
    assert all(f"\n  {verb} " in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(tmp_path, verb):
    assert mhmoe(tmp_path, verb, "--help").out.startswith("Usage: ")


def test_a_dry_run_prints_the_request_and_starts_nothing(corpus):
    before = sorted(corpus.glob("runs/*"))  # of other tests, which share the folder
    request = mhmoe(corpus, "submit", "spec.yaml", "--dry-run").json()
    assert "-m mhmoe_ray.train.job" in request["entrypoint"]
    assert sorted(corpus.glob("runs/*")) == before
    remote = mhmoe(corpus, "submit", "spec.yaml", "--dry-run", "--address", "http://head:8265").json()
    assert json.dumps(remote["runtime_env"]).count("mhmoe_") == 2
