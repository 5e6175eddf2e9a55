"""The Ray job of `mhmoe eval` and `mhmoe routing`, which computes an evaluation of a checkpoint."""

from collections.abc import Callable
from typing import ClassVar

from mhmoe_ray.errors import ClusterError
from mhmoe_ray.evaluate.request import EvalRequest, Evaluation, load_evaluation
from mhmoe_ray.remote import RemoteJob
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import location


class EvalJob(RemoteJob[Evaluation]):
    """Request for the job that computes an evaluation, and stores it in the run directory."""

    module: ClassVar[str] = "mhmoe_ray.evaluate.job"
    kind: ClassVar[str] = "eval"

    request: EvalRequest
    can_grow: bool
    """True if nodes may still join the job's cluster, so that waiting for resources makes sense."""

    @property
    def run(self) -> RunDir:
        """Directory of the run whose checkpoint is evaluated."""
        return RunDir(location(self.request.run))

    @property
    def job_name(self) -> str:
        return self.unique_name(self.run.id)

    def result(self, log: Callable[[], str]) -> Evaluation | None:
        return load_evaluation(self.run, self.request)

    def execute(self) -> None:
        """Compute the evaluation in a Ray task, when there are resources for it."""
        import ray

        request = self.request
        _check_resources(request, self.can_grow)
        self.print_line(f"loading {request.checkpoint}")
        task = ray.remote(num_cpus=request.cpus, num_gpus=request.gpus)(_run_evaluation)
        ray.get(task.remote(request))


def _check_resources(request: EvalRequest, can_grow: bool) -> None:
    """Print what the evaluation waits for; a cluster that is too small and cannot grow is a ClusterError."""
    import ray

    # A task runs on one node, so its CPUs are compared with those of the largest node and not with the sum over all
    # nodes.
    largest_node_cpus = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if request.gpus > ray.cluster_resources().get("GPU", 0):
        if not can_grow:
            raise ClusterError(
                "evaluation", "it needs a GPU and the cluster has none", "evaluate without a GPU: gpus is 0"
            )
        EvalJob.print_line("waiting for a GPU; the cluster has none at the moment")
    elif request.cpus > largest_node_cpus:
        if not can_grow:
            reason = (
                f"it needs {request.cpus} CPUs, as the run's workers do, and the largest node has {largest_node_cpus:g}"
            )
            raise ClusterError("evaluation", reason, "start a larger cluster, or name one")
        EvalJob.print_line(f"waiting for a node of {request.cpus} CPUs")
    elif request.cpus > (free_cpus := ray.available_resources().get("CPU", 0)):
        EvalJob.print_line(f"waiting for CPUs: {request.cpus} are needed and {free_cpus:g} are free")


def _run_evaluation(request: EvalRequest) -> None:
    # Importing torch takes seconds. Only the task imports it, so that the job can ask for the task's CPUs at once.
    from mhmoe_ray.evaluate.answer import run_evaluation

    run_evaluation(request, EvalJob.print_line)


if __name__ == "__main__":
    EvalJob.main()
