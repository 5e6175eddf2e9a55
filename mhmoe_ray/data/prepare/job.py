"""The job of `mhmoe data prepare`; the spec comes as packed YAML in MHMOE_SPEC."""

import os

import ray
import yaml

from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.errors import logging_errors
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.spec.load import unpacked


def main() -> None:
    spec = asked_for()
    ray.init()
    with logging_errors():
        prepare(spec)


def asked_for() -> RunSpec:
    return RunSpec.model_validate(yaml.safe_load(unpacked(os.environ["MHMOE_SPEC"])))


if __name__ == "__main__":
    main()
