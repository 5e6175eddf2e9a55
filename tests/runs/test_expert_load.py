import numpy as np
import pytest

from mhmoe_ray.runs.metrics import expert_loads, load_entropy


def test_load_entropy_is_one_for_even_loads_and_zero_for_one_expert():
    count_LE = np.array([[5, 5, 5, 5], [20, 0, 0, 0], [0, 0, 0, 0], [10, 10, 0, 0]])
    assert load_entropy(count_LE).tolist() == pytest.approx([1.0, 0.0, 0.0, 0.5])


def test_loads_are_1_where_they_are_even_and_0_where_there_are_no_routes():
    count_LE = np.array([[5, 5, 5, 5], [20, 0, 0, 0], [0, 0, 0, 0], [10, 10, 0, 0]])
    assert expert_loads(count_LE).tolist() == [[1, 1, 1, 1], [4, 0, 0, 0], [0, 0, 0, 0], [2, 2, 0, 0]]
