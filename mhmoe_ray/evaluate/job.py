"""The Ray job of `mhmoe eval` and `mhmoe routing`."""

from collections.abc import Callable
from typing import ClassVar

from mhmoe_ray.errors import ClusterError, MhmoeError, logging_errors
from mhmoe_ray.evaluate.request import EvalRequest, Evaluation, stored
from mhmoe_ray.remote import RemoteJob
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import location


class EvalJob(RemoteJob[Evaluation]):
    module: ClassVar[str] = "mhmoe_ray.evaluate.job"
    kind: ClassVar[str] = "eval"

    request: EvalRequest
    can_grow: bool
    """Whether nodes may join the cluster that the job runs on."""

    @property
    def run(self) -> RunDir:
        return RunDir(location(self.request.run))

    @property
    def job_name(self) -> str:
        return self.unique_name(self.run.id)

    def result(self, log: Callable[[], str]) -> Evaluation | None:
        return stored(self.run, self.request)


def main() -> None:
    import ray

    job = EvalJob.received()
    request = job.request
    ray.init()
    with logging_errors():
        _check_room(request, job.can_grow)
        task = ray.remote(num_cpus=request.cpus, num_gpus=request.gpus)(_answer)
        try:
            ray.get(task.remote(request))
        except ray.exceptions.RayTaskError as e:
            if isinstance(e.cause, MhmoeError):
                raise e.cause from e
            raise


def _check_room(request: EvalRequest, can_grow: bool) -> None:
    """Print what the evaluation waits for, if the cluster has no free resources for it.

    Raises:
        ClusterError: the cluster is too small and cannot grow, so the evaluation would wait forever.
    """
    import ray

    largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if request.gpus > ray.cluster_resources().get("GPU", 0):
        if not can_grow:
            raise ClusterError("evaluation", "it is to compute on a GPU, and the cluster has none", "give --gpus 0")
        _say("waiting for a GPU, of which the cluster has none at the moment")
    elif request.cpus > largest:
        if not can_grow:
            why = f"it is to compute on {request.cpus} CPUs, as the run's workers, and the largest node has {largest:g}"
            raise ClusterError("evaluation", why, "start a larger cluster, or name one with --address")
        _say(f"waiting for a node of {request.cpus} CPUs")
    elif request.cpus > (free := ray.available_resources().get("CPU", 0)):
        _say(f"waiting for CPUs: {request.cpus} are needed and {free:g} are free")


def _say(line: str) -> None:
    print(f"{EvalJob.kind}: {line}", flush=True)


def _answer(request: EvalRequest) -> None:
    # Imported only by the task: torch takes seconds, in which the job would not even have asked for it.
    from mhmoe_ray.evaluate.answer import answer

    answer(request, _say)


if __name__ == "__main__":
    main()
