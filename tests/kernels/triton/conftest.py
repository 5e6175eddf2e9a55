"""Fixtures of the tests of Triton kernels."""

import pytest

from tests.kernels.triton.problems import DEVICE


@pytest.fixture(scope="package", autouse=True)
def _interpreted():
    """Let Triton interpret kernels if there is no GPU.

    Triton reads TRITON_INTERPRET when a kernel is defined, so tests import kernels only inside their functions.
    """
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield
