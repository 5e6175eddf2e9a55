"""Tests of the table of families: each entry names objects that have the interface of their field."""

import inspect
from typing import get_args

import pytest

from mhmoe_ray.data.family import FamilyData
from mhmoe_ray.evaluate.answer import EvaluationContext
from mhmoe_ray.families import MODEL_FAMILIES, ModelFamily, ModelKind
from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.planner.family import FamilyPlan
from mhmoe_ray.serving.family import FamilyServing
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.train.objectives import Objective

CLASSES = {
    "model": Trunk,
    "plan": FamilyPlan,
    "data": FamilyData,
    "objective": Objective,
    "serving": FamilyServing,
}
FUNCTIONS = {"router": [ModelSpec], "evaluation": [EvaluationContext]}
"""Types of the positional parameters of the fields that name functions."""
every_family = pytest.mark.parametrize("kind", MODEL_FAMILIES)


def parameters(function):
    """Return the names, kinds and defaults of a function's parameters, without their types."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_every_kind_has_an_entry_and_every_name_an_interface():
    assert set(get_args(ModelKind)) == set(MODEL_FAMILIES)
    properties = {"title", "predicts_next_token", "has_tokenizer", "answers"}
    assert {*CLASSES, *FUNCTIONS, *properties} == set(ModelFamily._fields)
    assert all(inspect.isabstract(interface) for interface in CLASSES.values())


@every_family
@pytest.mark.parametrize("field", CLASSES)
def test_classes_have_the_methods_of_their_interface(kind, field):
    family_class, interface = MODEL_FAMILIES[kind].part(field), CLASSES[field]
    assert issubclass(family_class, interface)
    assert not inspect.isabstract(family_class)
    for name, function in inspect.getmembers(interface, inspect.isfunction):
        own_function = getattr(family_class, name)
        # The forward and the constructor of a model differ: each objective calls its own model.
        if name.startswith("_") or own_function is function or interface is Trunk:
            continue
        assert parameters(own_function) == parameters(function), name


@every_family
def test_models_are_built_from_a_spec_and_the_ids_of_experts(kind):
    names = [name for name, _, _ in parameters(MODEL_FAMILIES[kind].part("model"))]
    assert names == ["spec", "expert_ids"]


@every_family
@pytest.mark.parametrize("field", FUNCTIONS)
def test_functions_take_what_their_callers_pass(kind, field):
    signature = inspect.signature(MODEL_FAMILIES[kind].part(field), eval_str=True)
    assert [p.annotation for p in signature.parameters.values()] == FUNCTIONS[field]
