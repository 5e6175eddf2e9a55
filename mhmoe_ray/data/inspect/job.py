"""Entry point of the cluster job that `mhmoe data inspect` and `mhmoe data lint` run."""

from mhmoe_ray.data.inspect.result import SurveyRequest

if __name__ == "__main__":
    # The classes of the request and of the result must not belong to the module `__main__`, so they lie elsewhere.
    SurveyRequest.main()
