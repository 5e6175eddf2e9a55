"""What is said of a process of a measurement that failed."""

import re
import signal

from mhmoe_ray.errors import JobError


def failure(what: str, stderr: str, code: int) -> JobError:
    """With the first error of a traceback, which caused the others.

    Args:
        what: names the process.
        stderr: that it wrote.
        code: it ended with; by the signal of this number where it is negative.
    """
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    ended = f"exit code {code}" if code >= 0 else f"it was ended by {signal.Signals(-code).name}"
    return JobError(what, next(iter(errors or lines[-1:]), ended), "mend that and measure again")
