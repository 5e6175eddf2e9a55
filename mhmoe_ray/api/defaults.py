"""Defaults that functions of the Python interface and commands share.

The module imports nothing that takes long, so that commands start quickly.
"""

from collections.abc import Callable
from typing import Literal

OnNote = Callable[[str], object]
"""Callback that gets a line of text about the progress, such as the start of a cluster, or about a problem."""

STORAGE = "runs"
"""Default folder of run directories, below the current directory."""
LOCAL_CPUS = 8
"""Smallest number of logical CPUs that a local cluster is started with."""
EVALUATION_SAMPLES = 512
"""Largest number of samples of each domain (named source) of raw text on which a checkpoint is evaluated by default."""
SPEC_SUFFIXES = (".yaml", ".yml")
"""Suffixes that mark an argument as the path of a spec, where it could also name a run or a checkpoint."""
APPLICATION = "mhmoe"
"""Default name of the application of Ray Serve that serves a model."""
Prior = Literal["uniform", "updating", "cached"]
"""Prior probabilities of the domains, with which all experts of a model with router `domain` predict together, each
weighted by the probability of its domain."""


def ignore_note(line: str) -> None:
    """Ignore a line of text about the progress: the default of `on_note`."""
