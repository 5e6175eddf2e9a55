"""Values without the parts that differ from call to call: times, process ids, names of runs, addresses."""

import re
from pathlib import Path
from typing import Any

CHANGING_KEYS = {
    # moments and durations
    *("time", "created", "submitted", "imported", "seconds", "pause", "began", "eta_seconds"),
    # speeds
    *("tokens_per_s", "mean_tokens_per_s", "data_wait", "exchange_wait", "mfu"),
    # processes, nodes and clusters
    *("pid", "host", "node", "address", "dashboard", "replica", "stats", "system_fingerprint"),
}
"""Keys of JSON objects whose values are left out."""
LEFT_OUT = "(left out)"


class Normaliser:
    def __init__(self, folder: Path) -> None:
        """Compile the patterns of the parts that differ.

        Args:
            folder: The folder of a side, which is called <side> in all texts.
        """
        self._patterns = [
            (re.compile(re.escape(str(folder))), "<side>"),
            (re.compile(r"/tmp/mhmoe-\w+"), "<cluster>"),
            (re.compile(r"(127\.0\.0\.1|localhost):\d{4,5}"), r"\1:<port>"),
            # The end of a run's id, and of names that are made of it.
            (re.compile(r"-[0-9a-f]{6}(?![0-9a-f])"), "-<id>"),
            (re.compile(r"\b(cmpl|chatcmpl)-[0-9a-f]{8,}"), r"\1-<id>"),
            (re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d(\.\d+)?)?"), "<time>"),
            # A module that a job runs may be called anything.
            (re.compile(r"-m mhmoe\w+(\.\w+)+"), "-m <module>"),
            # So may one that Serve imports, which an image names beside the package that has it.
            (re.compile(r"\bmhmoe_ray(\.\w+)+:"), "<module>:"),
        ]

    def text(self, text: str) -> str:
        """Return the text without addresses, ids, times and the side's own folder."""
        for pattern, name in self._patterns:
            text = pattern.sub(name, text)
        return text

    def value(self, value: Any) -> Any:
        """Return a JSON value with its texts treated as by `text`, and without the values of `CHANGING_KEYS`."""
        if isinstance(value, dict):
            return {self.text(key): self._of_key(key, element) for key, element in value.items()}
        if isinstance(value, list):
            return [self.value(element) for element in value]
        return self.text(value) if isinstance(value, str) else value

    def _of_key(self, key: str, value: Any) -> Any:
        if key in CHANGING_KEYS and value is not None:
            return LEFT_OUT
        if key == "files" and isinstance(value, dict):
            # Of a checkpoint, with hashes: the order of tensors in a file is no one's concern, and these are compared.
            return sorted(value)
        return self.value(value)
