"""The job of `mhmoe data inspect` and `lint`: the request comes packed in MHMOE_REQUEST, the survey is in its log."""

import os
import sys

import ray

from mhmoe_ray.data.inspect.result import Request, lines_of
from mhmoe_ray.data.inspect.survey import survey
from mhmoe_ray.errors import logging_errors


def main() -> None:
    request = Request.unpacked(os.environ["MHMOE_REQUEST"])
    ray.init()
    with logging_errors():
        for line in lines_of(survey(request)):
            sys.stdout.write(f"{line}\n")  # at once: Ray's own lines go to the same file


if __name__ == "__main__":
    main()
