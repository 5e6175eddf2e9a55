"""What could not be read: kept with its place and reason, counted by source, and too much of it stops the job."""

import json
from collections.abc import Iterable

from mhmoe_ray.data.sources import BadLine, RawFile, Reason, Tally
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import DataSpec

FILE = "quarantine.jsonl"

EVIDENCE = 10_000
"""Lines that must be read before a share of them says something of the rest."""


def entry(domain: str, bad: BadLine) -> str:
    """A line of the quarantine file."""
    fields = {"domain": domain, "path": bad.path, "line": bad.line, "reason": bad.reason, "detail": bad.detail}
    return json.dumps(fields) + "\n"


class Limit:
    """How much may go into quarantine before a job stops.

    Args:
        spec: its `max_bad_...` keys.
        files: all raw ones; none where all of them have been read.
    """

    def __init__(self, spec: DataSpec, files: Iterable[RawFile]) -> None:
        self._lines, self._share, self._files = spec.max_bad_lines, spec.max_bad_share, spec.max_bad_files
        self._text_bytes = sum(file.size * file.inflation for file in files)

    def exceeded(self, tally: Tally) -> bool:
        """Whether the whole has more than is allowed, of which this is the tally."""
        return tally.damaged > self._files or tally.bad_lines > max(self._lines, int(self._share * tally.lines))

    def hopeless(self, tally: Tally) -> bool:
        """Whether the whole will have more than is allowed, as far as this tally of a part of it tells."""
        if tally.damaged > self._files:
            return True
        if not self._share:
            return tally.bad_lines > self._lines
        if tally.lines < EVIDENCE or not tally.text_bytes:
            return False
        expected = tally.lines * max(1.0, self._text_bytes / tally.text_bytes)
        return tally.bad_lines > max(self._lines, 2 * self._share * expected)

    def error(self, tally: Tally) -> DataError:
        """What to say when it is exceeded."""
        if tally.damaged > self._files:
            lost = tally.first[Reason.LOST]
            return DataError(
                f"{lost.path} line {lost.line}",
                f"{lost.why} ({tally.damaged:,} damaged files so far, data.max_bad_files is {self._files:,})",
                "mend or remove the file, or raise data.max_bad_files",
            )
        first = next(bad for reason, bad in tally.first.items() if not reason.loses_lines)
        allowed = f"data.max_bad_lines is {self._lines:,}"
        if self._share:
            allowed += f" and data.max_bad_share {self._share:g}"
        return DataError(
            f"{first.path} line {first.line}",
            f"{first.why} ({tally.bad_lines:,} of {tally.lines:,} unreadable so far, {allowed})",
            "mend or remove the line, or raise data.max_bad_lines or data.max_bad_share",
        )
