"""The job of `mhmoe data prepare`; the spec comes as YAML in MHMOE_SPEC."""

import os
import sys

import ray
import yaml

from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.errors import MhmoeError
from mhmoe_ray.spec import RunSpec


def main() -> None:
    spec = RunSpec.model_validate(yaml.safe_load(os.environ["MHMOE_SPEC"]))
    ray.init()
    try:
        prepare(spec)
    except MhmoeError as e:
        print(f"error: {e}")
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
