"""The job of `mhmoe eval` and `mhmoe routing`; the request comes as packed JSON in MHMOE_REQUEST."""

import os

import ray

from mhmoe_ray.errors import ClusterError, MhmoeError, logging_errors
from mhmoe_ray.evaluate import CAN_GROW, SAYS
from mhmoe_ray.evaluate.request import EvalRequest
from mhmoe_ray.spec.load import unpacked


def main() -> None:
    request = EvalRequest.model_validate_json(unpacked(os.environ["MHMOE_REQUEST"]))
    ray.init()
    with logging_errors():
        _check_room(request, can_grow=os.environ[CAN_GROW] != "0")
        task = ray.remote(num_cpus=request.cpus, num_gpus=request.gpus)(_answer)
        try:
            ray.get(task.remote(request))
        except ray.exceptions.RayTaskError as e:
            if isinstance(e.cause, MhmoeError):
                raise e.cause from e
            raise


def _check_room(request: EvalRequest, can_grow: bool) -> None:
    """Say what it will wait for.

    Raises:
        ClusterError: for ever.
    """
    largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if request.gpus > ray.cluster_resources().get("GPU", 0):
        if not can_grow:
            raise ClusterError("evaluation", "it is to compute on a GPU, and the cluster has none", "give --gpus 0")
        print(f"{SAYS}waiting for a GPU, of which the cluster has none at the moment", flush=True)
    elif request.cpus > largest:
        if not can_grow:
            why = f"it is to compute on {request.cpus} CPUs, as the run's workers, and the largest node has {largest:g}"
            raise ClusterError("evaluation", why, "start a larger cluster, or name one with --address")
        print(f"{SAYS}waiting for a node of {request.cpus} CPUs", flush=True)
    elif request.cpus > (free := ray.available_resources().get("CPU", 0)):
        print(f"{SAYS}waiting for CPUs: {request.cpus} are needed and {free:g} are free", flush=True)


def _answer(request: EvalRequest) -> None:
    # Imported only by the task: torch takes seconds, in which the job would not even have asked for it.
    from mhmoe_ray.evaluate.answer import answer

    answer(request)


if __name__ == "__main__":
    main()
