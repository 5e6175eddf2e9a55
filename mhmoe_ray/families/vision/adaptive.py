"""The adaptive number of experts of AdaMV-MoE (ICCV 2023): a task raises its own k if its validation loss stalls.

At each validation, the rule is applied to one task after another. With k the number of experts that a task chooses for
a token, L its loss, and s the step:

    if L < best:                             best = L, best_step = s, changed = False
    else, if s - best_step > patience:
        if changed:                          k = k - 1, and k stays from now on
        else, if k is not the largest:       k = k + 1, changed = True

In the paper (rule `published`), each task has its own `changed`, and the k of one task may stay while others change. In
the authors' code (rule `coded`), all tasks share `changed` and the decision that k stays. There, `changed` stays true
after a reduction, and a task at the largest k does nothing, so that its last raise is never taken back.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from mhmoe_ray.spec import AdaptiveSpec


class TopKChange(NamedTuple):
    """Change of the number of experts that a task chooses for each token, to `top_k`."""

    task: str
    top_k: int

    def __str__(self) -> str:
        return f"task {self.task} chooses {self.top_k} experts"


class TaskState(BaseModel):
    """State of the adaptive rule for one task: its number of experts, and its best validation loss so far."""

    top_k: int
    best_loss: float
    best_step: int
    has_changed: bool = False
    """True if k changed after the best loss. With rule `coded`, all tasks use the value of the first task."""
    is_stopped: bool = False
    """True if k no longer changes. With rule `coded`, all tasks use the value of the first task."""


class AdaptiveState(BaseModel):
    """State of the adaptive rule for all tasks, which is saved in checkpoints."""

    tasks: dict[str, TaskState]


class AdaptiveTopK:
    """Rule that adapts each task's number of experts k to its validation loss, one task after another."""

    def __init__(self, spec: AdaptiveSpec, tasks: Sequence[str], top_k: int) -> None:
        self.spec = spec
        first_state = TaskState(top_k=top_k, best_loss=spec.first_loss, best_step=spec.first_step)
        self.state = AdaptiveState(tasks={name: first_state.model_copy() for name in tasks})

    @property
    def top_k(self) -> dict[str, int]:
        """The number of experts that each task chooses for a token, by the task's name."""
        return {name: task.top_k for name, task in self.state.tasks.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Replace the state of the rule by the one in a checkpoint."""
        self.state = AdaptiveState.model_validate(state)

    def update(self, step: int, losses: Mapping[str, float]) -> list[TopKChange]:
        """Apply the rule after a validation, and return the changes.

        `losses` has the loss of each task with held-out samples, summed over micro-batches.
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
