"""The adaptive number of experts of AdaMV-MoE (ICCV 2023): a task raises its own k while its validation loss stalls.

The rule is applied to the tasks one after another, at each validation. With L the loss of the task, and s the step:

    L < best:                        best = L, best_step = s, changed = False
    else, s - best_step > patience:  if changed: k = k - 1, and k stays from now on
                                     else: k = k + 1, unless k is the largest; changed = True

As published, `changed` and the stop belong to the task. As coded, all tasks share them, `changed` stays true after a
reduction, and a task at the largest k does nothing, so that its last raise is never taken back.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from mhmoe_ray.spec import AdaptiveSpec


class TopKChange(NamedTuple):
    """Change of the number of experts of a task."""

    task: str
    top_k: int
    """The new number."""


class TaskState(BaseModel):
    """State of one task."""

    top_k: int
    best_loss: float
    best_step: int
    has_changed: bool = False
    """True if k was changed and the loss has not improved since. With rule `coded`, that of the first task counts."""
    is_stopped: bool = False
    """True if k stays. With rule `coded`, that of the first task counts."""


class AdaptiveState(BaseModel):
    """State of the rule, which checkpoints have."""

    tasks: dict[str, TaskState]


class AdaptiveTopK:
    """Rule that chooses the number of experts of each task."""

    def __init__(self, spec: AdaptiveSpec, tasks: Sequence[str], top_k: int) -> None:
        """Create the rule in its first state.

        Args:
            spec: options of the rule.
            tasks: names of the tasks, in the order in which the rule is applied.
            top_k: k of all tasks at the start.
        """
        self.spec = spec
        first_state = TaskState(top_k=top_k, best_loss=spec.first_loss, best_step=spec.first_step)
        self.state = AdaptiveState(tasks={name: first_state.model_copy() for name in tasks})

    @property
    def top_k(self) -> dict[str, int]:
        """The number of experts of each task."""
        return {name: task.top_k for name, task in self.state.tasks.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from the state in a checkpoint."""
        self.state = AdaptiveState.model_validate(state)

    def update(self, step: int, losses: Mapping[str, float]) -> list[TopKChange]:
        """Apply the rule after a validation, and return the changes.

        Args:
            step: number of steps done.
            losses: summed validation loss of each task; tasks without held-out samples are left out.
        """
        previous_top_k = self.top_k
        for name, loss in losses.items():
            self._update_task(self.state.tasks[name], step, loss)
        return [TopKChange(name, k) for name, k in self.top_k.items() if k != previous_top_k[name]]

    def _update_task(self, task: TaskState, step: int, loss: float) -> None:
        is_coded = self.spec.rule == "coded"
        shared = next(iter(self.state.tasks.values())) if is_coded else task
        if loss < task.best_loss:
            task.best_loss, task.best_step, shared.has_changed = loss, step, False
            return
        is_largest = task.top_k >= self.spec.largest
        if step - task.best_step <= self.spec.patience or shared.is_stopped or (is_coded and is_largest):
            return
        if shared.has_changed:
            task.top_k, shared.is_stopped = task.top_k - 1, True
            return
        if not is_largest:
            task.top_k, shared.has_changed = task.top_k + 1, True
