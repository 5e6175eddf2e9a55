"""Replacement of values that differ between two calls of a command: times, process ids, names of runs, addresses."""

import re
from pathlib import Path
from typing import Any

CHANGING_KEYS = {
    # times and durations
    *("time", "created", "submitted", "imported", "seconds", "pause", "began", "start_ticks", "eta_seconds"),
    # speeds
    *("tokens_per_s", "mean_tokens_per_s", "data_wait", "exchange_wait", "mfu"),
    # processes, nodes and clusters
    *("pid", "host", "node", "address", "dashboard", "replica", "stats", "system_fingerprint"),
    # a hash over the modification times of files
    "text_version",
}
"""Keys of JSON objects whose values are left out."""
LEFT_OUT = "(left out)"


class Normaliser:
    """Replacer that puts placeholders for values that differ between two calls of a command into texts and JSON."""

    def __init__(self, folder: Path) -> None:
        """Compile the patterns of the texts that are replaced.

        Args:
            folder: The folder of a side; its path is replaced by <side>.
        """
        self._patterns = [
            (re.compile(re.escape(str(folder))), "<side>"),
            (re.compile(r"/tmp/mhmoe-\w+"), "<cluster>"),
            (re.compile(r"(127\.0\.0\.1|localhost):\d{4,5}"), r"\1:<port>"),
            # The end of a run's id is random. The id is also a part of other names.
            (re.compile(r"-[0-9a-f]{6}(?![0-9a-f])"), "-<id>"),
            (re.compile(r"\b(cmpl|chatcmpl)-[0-9a-f]{8,}"), r"\1-<id>"),
            (re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d(\.\d+)?)?"), "<time>"),
            # The module that a job runs may have another name in the tree of the other side.
            (re.compile(r"-m mhmoe\w+(\.\w+)+"), "-m <module>"),
            # The module that Serve imports may have another name too, but the package must have the same name.
            (re.compile(r"\bmhmoe_ray(\.\w+)+:"), "<module>:"),
        ]

    def text(self, text: str) -> str:
        """Return the text with placeholders for ids, times, ports, temporary folders and the side's own folder."""
        for pattern, name in self._patterns:
            text = pattern.sub(name, text)
        return text

    def value(self, value: Any) -> Any:
        """Return a JSON value with `text` applied to each string, and a placeholder for the values of `CHANGING_KEYS`.

        A null stays, also at those keys.
        """
        if isinstance(value, dict):
            return {self.text(key): self._of_key(key, element) for key, element in value.items()}
        if isinstance(value, list):
            return [self.value(element) for element in value]
        return self.text(value) if isinstance(value, str) else value

    def _of_key(self, key: str, value: Any) -> Any:
        if key in CHANGING_KEYS and value is not None:
            return LEFT_OUT
        if key == "files" and isinstance(value, dict):
            # The value has the files of a checkpoint with their hashes. A hash changes with the order of tensors in a
            # file, which does not matter. The tensors themselves are compared elsewhere.
            return sorted(value)
        return self.value(value)
