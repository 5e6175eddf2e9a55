"""The interface of trackers, which show the metrics of a run outside of its directory."""

from typing import Any, Literal, Protocol

EndStatus = Literal["FINISHED", "KILLED", "FAILED"]
"""Status of a run at the end of its training."""


class Tracker(Protocol):
    """Tracker of one run."""

    def report(self, line: dict[str, Any]) -> None:
        """Take the metrics of a step, a line of metrics.jsonl. Training waits for this call."""

    def flush(self) -> None:
        """Write everything that was reported, if the tracker has files."""

    def close(self, end_status: EndStatus) -> None:
        """Pass on what is left, with the status at the end of the training."""
