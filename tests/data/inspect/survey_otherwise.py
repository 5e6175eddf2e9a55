"""mhmoe_ray.data.inspect.job with one task at a time, or with its entries in many partitions.

Run as `python -m tests.data.inspect.survey_otherwise serially|in-partitions`.
"""

import os
import sys

import ray
import ray.data

from mhmoe_ray.data.inspect.job import main
from mhmoe_ray.data.inspect.result import Request, lines_of
from mhmoe_ray.data.inspect.survey import survey


def in_partitions() -> None:
    ray.init()
    for line in lines_of(survey(Request.unpacked(os.environ["MHMOE_REQUEST"]), partition_bytes=1000)):
        print(line)


if __name__ == "__main__":
    if sys.argv[1] == "in-partitions":
        in_partitions()
    else:
        limits = ray.data.ExecutionResources(cpu=1)
        ray.data.DataContext.get_current().execution_options.resource_limits = limits
        main()
