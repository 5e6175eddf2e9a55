"""The interface of trackers, which pass the metrics of a run to TensorBoard or MLflow."""

from typing import Any, Literal, Protocol

EndStatus = Literal["FINISHED", "KILLED", "FAILED"]
"""Status of a run at the end of its training, in MLflow's words; KILLED means stopped before the last step."""


class Tracker(Protocol):
    """Tracker of one run, which passes its metrics to a tool such as TensorBoard or MLflow."""

    def report(self, line: dict[str, Any]) -> None:
        """Take the metrics of a step, as in a line of metrics.jsonl. The call must be fast: training waits."""

    def flush(self) -> None:
        """Write all reported metrics to files, if the tracker has files."""

    def close(self, end_status: EndStatus) -> None:
        """Write or send all remaining metrics, with the final status of the training."""
