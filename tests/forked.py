"""The server that ranks and commands of tests are forked from.

It has imported what they would import, which takes seconds for each of them. It has computed nothing, and so has no
threads of torch that a fork would lose. It has not imported the modules that read the environment at their import: Ray,
and the command line's consoles.
"""

import multiprocessing
import os

multiprocessing.set_forkserver_preload(
    ["tests.train.jobs", "torch._dynamo", "deepspeed", "mhmoe_ray.checkpoint.huggingface.import_", "typer"]
)
FORKED = multiprocessing.get_context("forkserver")


def take_over(environment: dict[str, str]) -> None:
    """Take over the environment of the process that asked for this one; the server's own is as old as the server."""
    os.environ.clear()
    os.environ |= environment
