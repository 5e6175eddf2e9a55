"""The job of `mhmoe data prepare`; the spec comes as YAML in MHMOE_SPEC."""

import os

import ray
import yaml

from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.errors import logging_errors
from mhmoe_ray.spec import RunSpec


def main() -> None:
    spec = RunSpec.model_validate(yaml.safe_load(os.environ["MHMOE_SPEC"]))
    ray.init()
    with logging_errors():
        prepare(spec)


if __name__ == "__main__":
    main()
