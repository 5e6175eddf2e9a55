"""What the engine asks of the processes that compute (vLLM's `worker_extension_cls`)."""

from typing import Any


class WorkerExtension:
    """Mixed into vLLM's worker."""

    model_runner: Any

    def mhmoe_counts(self) -> list[list[int]]:
        """Routes per layer and expert since `mhmoe_count_anew`. All ranks route all rows, so that each has the whole
        count."""
        counts: list[list[int]] = self.model_runner.get_model().counts()
        return counts

    def mhmoe_count_anew(self) -> None:
        """Of what follows alone: until then vLLM has only tried the model."""
        self.model_runner.get_model().count_anew()
