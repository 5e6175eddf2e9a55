"""Run mhmoe_ray.data.prepare.job with one task at a time, in chunks of a few documents."""

import ray.data

from mhmoe_ray.data.prepare import pipeline
from mhmoe_ray.data.prepare.job import main


def in_small_chunks() -> None:
    pipeline.CHUNK = 1_000


def one_task_at_a_time() -> None:
    limits = ray.data.ExecutionResources(cpu=1)
    ray.data.DataContext.get_current().execution_options.resource_limits = limits


if __name__ == "__main__":
    in_small_chunks()
    one_task_at_a_time()
    main()
