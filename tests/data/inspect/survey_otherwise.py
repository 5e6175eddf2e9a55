"""Job that surveys data like mhmoe_ray.data.inspect.job, but with one task at a time or with many partitions.

It runs as `python -m tests.data.inspect.survey_otherwise serially|in-partitions`.
"""

import sys

import ray
import ray.data

from mhmoe_ray.data.inspect.result import SurveyRequest
from mhmoe_ray.data.inspect.survey import survey


def survey_in_partitions() -> None:
    ray.init()
    request = SurveyRequest.received()
    request.answer(survey(request, partition_bytes=1000))


if __name__ == "__main__":
    if sys.argv[1] == "in-partitions":
        survey_in_partitions()
    else:
        resource_limits = ray.data.ExecutionResources(cpu=1)
        ray.data.DataContext.get_current().execution_options.resource_limits = resource_limits
        SurveyRequest.main()
