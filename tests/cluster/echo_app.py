"""A Serve application that answers every request with one word.

A request with the query `began=FILE&until=FILE` creates the first file and is answered when the second one exists. If
the arguments of the application have `gate`, Serve can build it only when the file of that path exists.
"""

import asyncio
import time
from pathlib import Path

from ray import serve


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Echo:
    """Deployment that answers with its word; it cannot be constructed with the word "bad"."""

    def __init__(self, word):
        if word == "bad":
            raise ValueError("bad\nword")
        self.word = word

    async def __call__(self, request):
        if "began" in request.query_params:
            Path(request.query_params["began"]).touch()
            while not Path(request.query_params["until"]).exists():
                await asyncio.sleep(0.1)
        return self.word


def build(args):
    """Return the application for the arguments of a configuration: `word`, and optionally the file `gate`."""
    while "gate" in args and not Path(args["gate"]).exists():
        time.sleep(0.1)
    return Echo.bind(args["word"])
