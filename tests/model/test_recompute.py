"""Tests of values that a recomputed forward takes from the first one."""

import gc
import weakref

import pytest
import torch

from mhmoe_ray.model.recompute import recall, recompute_in_backward


class Value:
    """Value with a number; weak references can follow it."""

    def __init__(self, number):
        self.number = number


class Layer:
    """Function of a tensor that asks for two values, each of which `compute` numbers anew."""

    def __init__(self):
        self.computed, self.multipliers, self.fails = 0, [], False

    def compute(self):
        self.computed += 1
        return Value(self.computed)

    def __call__(self, x):
        values = [recall(self.compute).number for _ in range(2)]
        self.multipliers.append(values)
        if self.fails:
            raise ValueError("the step fails")
        return (x.exp() * values[0]).exp() * values[1]


def test_a_recomputed_forward_has_the_values_of_the_first_one():
    layer, x = Layer(), torch.zeros(3, requires_grad=True)
    # Two micro-batches are alive at the same time, and their backwards run in reverse order.
    losses = [recompute_in_backward(layer, x).sum() for _ in range(2)]
    with torch.no_grad():
        layer(x)
        recompute_in_backward(layer, x)
    layer.fails = True
    with pytest.raises(ValueError, match="the step fails"):
        recompute_in_backward(layer, x)
    layer.fails = False
    for loss in reversed(losses):
        loss.backward()
    assert layer.multipliers == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [3, 4], [1, 2]]
    assert layer.computed == 10


def test_each_backward_through_a_kept_graph_has_the_same_values():
    layer, x = Layer(), torch.zeros(3, requires_grad=True)
    loss = recompute_in_backward(layer, x).sum()
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert layer.multipliers == [[1, 2]] * 3


def test_values_outside_of_recomputation_are_computed_anew():
    layer, x = Layer(), torch.zeros(3, requires_grad=True)
    layer(x).sum().backward()
    layer(x).sum().backward()
    assert layer.multipliers == [[1, 2], [3, 4]]


def test_values_are_freed_with_the_graph():
    references = []

    def remember_and_double(x):
        value = recall(lambda: Value(2))
        references.append(weakref.ref(value))
        return (x * value.number).exp()

    x = torch.zeros(3, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        recompute_in_backward(remember_and_double, x).sum().backward()
        assert len(references) == 2
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()
