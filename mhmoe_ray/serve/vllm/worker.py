"""What the engine asks of the processes that compute (vLLM's `worker_extension_cls`)."""

from typing import Any


class WorkerExtension:
    """Mixed into vLLM's worker."""

    model_runner: Any

    def mhmoe_counts(self) -> list[list[int]]:
        """Routes per layer and expert since the start. All ranks route all rows, so that each has the whole count."""
        counts: list[list[int]] = self.model_runner.get_model().counts()
        return counts
