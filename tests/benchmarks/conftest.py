"""Fixtures of the benchmarks' tests, which they share with the tests of mhmoe_ray/bench."""

from tests.bench.conftest import _single_thread, project

__all__ = ["_single_thread", "project"]
