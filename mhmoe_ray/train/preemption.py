"""Preemption of a node: the notice of a spot machine, or `ray drain-node` with a deadline.

Ray Train sends all workers a preemption notice, and ends the worker group at the deadline. Steps that are trained until
then would be repeated. So a run saves a checkpoint as soon as it gets the notice and ends the worker group itself. The
next worker group starts at exactly that step, on other nodes or with fewer workers.
"""

from ray.exceptions import RayActorError
from ray.train import PreemptionInfo

from mhmoe_ray.ray_compat import get_train_context


class PreemptedError(RayActorError):
    """Error that ends each rank of a worker group when one of its nodes is preempted."""

    # Ray Train has no API for a worker group that ends itself: if a rank returns, the run ends, and if it raises, that
    # counts as a failure. Only the death of an actor whose node was preempted does not count, so this error takes that
    # form.
    def __init__(self) -> None:
        super().__init__(error_msg="a node of the worker group is being preempted", preempted=True)


def preemption_notice() -> PreemptionInfo | None:
    """Return the preemption notice that this rank has received, if any; other ranks may get it a step earlier or
    later."""
    # `ray.train.get_preemption_info` is not called here: it makes all ranks agree on one value through an actor, which
    # is too slow for a call in every step.
    info: PreemptionInfo | None = get_train_context().preemption_context.preemption_info
    return info
