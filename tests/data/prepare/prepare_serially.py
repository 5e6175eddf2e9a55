"""Job that runs mhmoe_ray.data.prepare.job with one task at a time, in chunks of a few documents."""

import ray.data

from mhmoe_ray.data.prepare import pipeline
from mhmoe_ray.data.prepare.job import PrepareRequest


def use_small_chunks() -> None:
    pipeline.CHUNK_CHARACTERS = 1_000


def run_tasks_serially() -> None:
    resource_limits = ray.data.ExecutionResources(cpu=1)
    ray.data.DataContext.get_current().execution_options.resource_limits = resource_limits


if __name__ == "__main__":
    use_small_chunks()
    run_tasks_serially()
    PrepareRequest.main()
