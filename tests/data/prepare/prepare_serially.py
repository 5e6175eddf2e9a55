"""mhmoe_ray.data.prepare.job with one task at a time."""

import ray.data

from mhmoe_ray.data.prepare.job import main

if __name__ == "__main__":
    limits = ray.data.ExecutionResources(cpu=1)
    ray.data.DataContext.get_current().execution_options.resource_limits = limits
    main()
