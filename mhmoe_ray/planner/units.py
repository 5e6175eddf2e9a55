"""Bytes of the numbers that a run computes with."""

from mhmoe_ray.spec import RunSpec

FLOAT32 = 4
INT32 = 4
INT64 = 8


def compute_bytes(spec: RunSpec) -> int:
    """Of a value in matrix products and in the rows that ranks exchange."""
    return 2 if spec.train.precision == "bfloat16" else FLOAT32
