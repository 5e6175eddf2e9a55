"""Tests of custom operators of kernels `grouped` and `cpp`: results on fake tensors have the shapes of real ones."""

import pytest
import torch
from torch._dynamo.trace_rules import get_torch_obj_rule_map
from torch.utils._python_dispatch import TorchDispatchMode

from mhmoe_kernels import BACKENDS, GeluSubln, Swiglu, run_experts
from tests.kernels.problems import make_problem
from tests.support.cpp_kernel import runs_here

STEPS = ("forward", "backward")


class CheckOperators(TorchDispatchMode):
    """Dispatch mode that checks each call of an operator of this project by `torch.library.opcheck`."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mhmoe":
            self.names.add(function._schema.name.removeprefix("mhmoe::"))
            torch.library.opcheck(function, args, test_utils=("test_schema", "test_faketensor"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("function", [Swiglu(), GeluSubln()])
def test_fake_results_of_grouped_experts_have_the_shapes_of_real_ones(function, recompute):
    inputs = make_problem(3, n=700, d=12, f=40, e=5, k=2, dtype=torch.float32, function=function)
    names = check_operators("grouped", inputs, recompute)
    assert names == {f"grouped_{function.name.removesuffix('_subln')}_{step}" for step in STEPS}


@runs_here
@pytest.mark.cpu
def test_fake_results_of_compiled_experts_have_the_shapes_of_real_ones():
    inputs = make_problem(3, n=300, d=16, f=40, e=5, k=2, dtype=torch.bfloat16)
    assert check_operators("cpp", inputs, 0.0) == {f"cpp_swiglu_{step}" for step in STEPS}


def check_operators(backend, inputs, recompute):
    """Run experts forward and backward as compiled code does, check each operator that they call, and return the
    operators' names."""
    assert BACKENDS[backend].unavailable_reason(torch.device("cpu")) is None
    x_ND, expert_NK, gate_NK, weights = inputs
    # torch.compile keeps a table of torch's functions from its first use on. It must not contain the function below, or
    # no later test of this process could compile code that calls `is_compiling`.
    get_torch_obj_rule_map()
    with pytest.MonkeyPatch.context() as patch, CheckOperators() as mode:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        y_ND = run_experts(backend, x_ND, expert_NK, gate_NK, weights._replace(recompute=recompute))
        y_ND.sum().backward()
    return mode.names
