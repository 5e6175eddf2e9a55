"""A Serve application that answers with one word.

Where a request names two files, it creates the one and waits for the other. Where its arguments name a file, its
construction waits for that file.
"""

import asyncio
import time
from pathlib import Path

from ray import serve


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Echo:
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
    while "gate" in args and not Path(args["gate"]).exists():
        time.sleep(0.1)
    return Echo.bind(args["word"])
