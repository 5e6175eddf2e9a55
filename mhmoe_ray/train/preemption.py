"""A node that is to be taken away: a spot machine's notice, or `ray drain-node` with a deadline.

Ray Train tells all workers of the node and its deadline, and ends the group at the deadline. Whatever is trained until
then would be trained again, so a run saves a checkpoint as soon as it hears of it and ends the group itself. The next
one starts at that very step, on other nodes or with fewer workers.
"""

from ray.exceptions import RayActorError
from ray.train import PreemptionInfo

from mhmoe_ray.ray_compat import get_train_context


class PreemptedError(RayActorError):
    """Ends a rank of such a group.

    Ray Train has no word for that: a rank that returns ends the run, one that raises has failed. But it forgives the
    death of an actor whose node was taken away, by this flag of the exception.
    """

    def __init__(self) -> None:
        super().__init__(error_msg="a node of the worker group is being taken away", preempted=True)


def announced() -> PreemptionInfo | None:
    """What this rank was told; others may hear of it a step earlier or later.

    `ray.train.get_preemption_info` asks all ranks through an actor, which is too much for every step. It reads this.
    """
    info: PreemptionInfo | None = get_train_context().preemption_context.preemption_info
    return info
