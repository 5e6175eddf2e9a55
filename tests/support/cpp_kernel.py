"""Conditions under which the C++ kernel compiles on this machine."""

import os
import shutil
import sys

import pytest

from mhmoe_kernels.cpu import CpuLevel, cpu_level

HAS_COMPILER = bool(os.environ.get("CXX") or shutil.which("g++"))
MUST_COMPILE = sys.platform == "linux" and cpu_level() >= CpuLevel.AVX512_BF16 and HAS_COMPILER
"""True if the kernel must compile on this machine.

`unavailable_reason` cannot decide this, because the tests of a kernel that does not compile would then be skipped.
"""
runs_here = pytest.mark.skipif(not MUST_COMPILE, reason="needs Linux, a CPU with AVX512_BF16, and g++")
