"""Fork server for processes that tests start: ranks of process groups, and commands.

The server has imported the large modules, which would take each process seconds. It has computed nothing, so it has no
threads of torch that a fork would lose. It has not imported modules that read the environment when they are imported:
Ray, and the module of the command line that creates rich's consoles.
"""

import multiprocessing
import os

multiprocessing.set_forkserver_preload(
    ["tests.train.jobs", "torch._dynamo", "deepspeed", "mhmoe_ray.checkpoint.huggingface.import_", "typer"]
)
FORKED = multiprocessing.get_context("forkserver")


def replace_environment(environment: dict[str, str]) -> None:
    """Replace this process's environment variables.

    A forked process has the variables that the server was started with, and needs those that its parent has now.
    """
    os.environ.clear()
    os.environ |= environment
