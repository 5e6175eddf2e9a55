"""What is said of sizes that cannot be measured, and of a process of a measurement that failed."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from mhmoe_ray.errors import JobError, SpecError


@contextmanager
def checked_sizes(what: str) -> Iterator[None]:
    """In it a model that there cannot be is a mistake of whom gave its sizes.

    Args:
        what: was given them.

    Raises:
        SpecError: with the first reason.
    """
    try:
        yield
    except ValidationError as e:
        why = e.errors()[0]["msg"].removeprefix("Value error, ")
        raise SpecError(what, why, "choose other sizes") from e


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
