"""The server that ranks and commands of tests are forked from. It has imported what they would, seconds of it for each.

It has computed nothing, and so has no threads of torch that a fork would lose. It has not imported what reads the
environment at that: Ray, and the command line's consoles.
"""

import multiprocessing
import os

multiprocessing.set_forkserver_preload(
    ["tests.train.jobs", "torch._dynamo", "deepspeed", "mhmoe_ray.checkpoint.huggingface.import_", "typer"]
)
FORKED = multiprocessing.get_context("forkserver")


def take_over(environment: dict[str, str]) -> None:
    """That of whoever asked for this process; the server's is as old as the server."""
    os.environ.clear()
    os.environ |= environment
