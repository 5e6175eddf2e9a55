"""Defaults that functions of the interface and commands share. The module imports nothing that takes long."""

import os
from collections.abc import Callable
from typing import Literal

OnNote = Callable[[str], object]
"""Function that is called with a line about what is done, such as the start of a cluster, or about a problem."""

STORAGE = "runs"
"""Default folder of run directories, below the current directory."""
LOCAL_CPUS = 8
"""Smallest number of logical CPUs that a local cluster is started with."""
EVALUATION_SAMPLES = 512
"""Largest number of samples of each domain of raw text that a checkpoint is evaluated on by default."""
SPEC_SUFFIXES = (".yaml", ".yml")
"""Suffixes that mark a text as the path of a spec where it may also name something else."""
APPLICATION = "mhmoe"
"""Default name of a served application."""
Prior = Literal["uniform", "updating", "cached"]
"""Prior probabilities of the domains of a text, with which all experts of a model with router `domain` predict
together."""


def ignore_note(line: str) -> None:
    """Do nothing with a line; this is the default of `on_note`."""


def default_storage() -> str:
    """Return the folder of run directories that is used unless another is named: MHMOE_STORAGE, else `runs`."""
    return os.environ.get("MHMOE_STORAGE", STORAGE)
