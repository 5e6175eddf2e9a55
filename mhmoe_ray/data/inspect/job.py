"""Entry point of the cluster job that `mhmoe data inspect` and `mhmoe data lint` run."""

from mhmoe_ray.data.inspect.result import SurveyRequest
from mhmoe_ray.errors import logging_errors


def main() -> None:
    """Answer the current job's request for a survey, and log errors for the user."""
    import ray

    from mhmoe_ray.data.inspect.survey import survey

    request = SurveyRequest.received()
    ray.init()
    with logging_errors():
        request.answer(survey(request))


if __name__ == "__main__":
    main()
