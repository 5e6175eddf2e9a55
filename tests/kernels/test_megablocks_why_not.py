"""Tests of the messages that tell users why megablocks cannot run."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from mhmoe_kernels.megablocks import _missing_dependency, unavailable_reason

needs_megablocks = pytest.mark.skipif(
    None in map(find_spec, ("megablocks", "stk", "triton")),
    reason="megablocks, stanford-stk or triton is not installed",
)


def missing_dependency_in_process(**env):
    """Return what `_missing_dependency` returns in a new process with the variables `env`, followed by a line break.

    That process imports the installed megablocks, without the module that replaces its CUDA extension in other tests.
    """
    code = "from mhmoe_kernels.megablocks import _missing_dependency; print(_missing_dependency())"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **env}
    ).stdout


def test_importing_kernels_imports_no_optional_package():
    code = "import sys, mhmoe_kernels; sys.exit(bool(sys.modules.keys() & {'megablocks', 'stk', 'triton'}))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_megablocks_is_unavailable_on_cpu():
    assert unavailable_reason(torch.device("cpu")) == "megablocks needs CUDA; the device is cpu"


@needs_megablocks
@pytest.mark.parametrize(
    ("module", "package"), [("triton", "triton"), ("stk", "stanford-stk"), ("megablocks", "megablocks")]
)
def test_reason_names_missing_package(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    assert re.match(f"{package} is not installed: pip install [^\n]+$", _missing_dependency())


@needs_megablocks
@pytest.mark.skipif(find_spec("megablocks_ops") is not None, reason="its extension is compiled here")
def test_missing_extension_makes_megablocks_unavailable():
    assert re.match(
        r"megablocks was built without its CUDA extension megablocks_ops: .+\n$", missing_dependency_in_process()
    )


@needs_megablocks
def test_extension_for_other_torch_makes_megablocks_unavailable(tmp_path):
    # The module stands for an extension of another torch: a dynamic library that lacks a symbol raises an ImportError
    # like this one.
    (tmp_path / "megablocks_ops.py").write_text("raise ImportError('undefined symbol: _ZN3c10\\nmore')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert (
        missing_dependency_in_process(PYTHONPATH=path) == "megablocks cannot be imported: undefined symbol: _ZN3c10\n"
    )
