"""Preemption of a node: a spot machine's notice, or `ray drain-node` with a deadline.

Ray Train tells all workers the node and its deadline, and ends the worker group at the deadline. Steps that are trained
until then would have to be repeated, so a run saves a checkpoint as soon as it gets the notice and ends the worker
group itself. The next worker group starts at exactly that step, on other nodes or with fewer workers.
"""

from ray.exceptions import RayActorError
from ray.train import PreemptionInfo

from mhmoe_ray.ray_compat import get_train_context


class PreemptedError(RayActorError):
    """Error that ends each rank of a worker group when one of its nodes is preempted.

    Ray Train has no API for this: a rank that returns ends the run, and a rank that raises has failed. But Ray Train
    forgives the death of an actor whose node was preempted, which it recognizes by this flag of the exception.
    """

    def __init__(self) -> None:
        super().__init__(error_msg="a node of the worker group is being taken away", preempted=True)


def announced() -> PreemptionInfo | None:
    """Return the preemption notice that this rank has received, None without one.

    Other ranks may receive it a step earlier or later. `ray.train.get_preemption_info` asks all ranks through an actor,
    which is too expensive for every step; it reads the same value on each rank that this function returns.
    """
    info: PreemptionInfo | None = get_train_context().preemption_context.preemption_info
    return info
