"""Reasons that a user reads where megablocks cannot run."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from mhmoe_kernels.megablocks import _missing, why_not

installed = pytest.mark.skipif(
    None in map(find_spec, ("megablocks", "stk", "triton")),
    reason="megablocks, stanford-stk or triton is not installed",
)


def missing_in_a_process(**env):
    """Return the reason in a new process, where megablocks is as the machine has it, without the stand-in."""
    code = "from mhmoe_kernels.megablocks import _missing; print(_missing())"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **env}
    ).stdout


def test_importing_the_kernels_imports_none_of_it():
    code = "import sys, mhmoe_kernels; sys.exit(bool(sys.modules.keys() & {'megablocks', 'stk', 'triton'}))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_why_not_on_a_cpu():
    assert why_not(torch.device("cpu")) == "megablocks needs CUDA; the device is cpu"


@installed
@pytest.mark.parametrize(
    ("module", "package"), [("triton", "triton"), ("stk", "stanford-stk"), ("megablocks", "megablocks")]
)
def test_why_not_names_the_package_to_install(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    assert re.match(f"{package} is not installed: pip install [^\n]+$", _missing())


@installed
@pytest.mark.skipif(find_spec("megablocks_ops") is not None, reason="its extension is compiled here")
def test_why_not_without_the_extension():
    assert re.match(r"megablocks was built without its CUDA extension megablocks_ops: .+\n$", missing_in_a_process())


@installed
def test_why_not_with_an_extension_for_another_torch(tmp_path):
    # A dynamic library that lacks a symbol fails with an ImportError like this one.
    (tmp_path / "megablocks_ops.py").write_text("raise ImportError('undefined symbol: _ZN3c10\\nmore')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert missing_in_a_process(PYTHONPATH=path) == "megablocks cannot be imported: undefined symbol: _ZN3c10\n"
