"""Comparison of two trainings that differ only in rounding."""

import pytest
import torch


def assert_alike(result, expected):
    """Assert that two results of `train_and_collect` are equal up to rounding."""
    for name, gradient in expected["gradients"].items():
        assert (result["gradients"][name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-9, f"gradient of {name}"
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    # Clipping divides by this norm, so a wrong norm scales all gradients. It would not show in weights, because Adam is
    # invariant to the scale of gradients.
    assert result["norms"][0] == pytest.approx(expected["norms"][0], rel=1e-5)
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    for part, atol in (("weights", 1e-3), ("moments", 1e-5)):
        assert result[part].keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            torch.testing.assert_close(result[part][name], tensor, atol=atol, rtol=1e-2, msg=f"{part}: {name}")
    assert result["validation"] == pytest.approx(expected["validation"], rel=1e-4)
