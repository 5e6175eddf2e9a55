"""A Serve application that answers with one word."""

import asyncio

from ray import serve


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Echo:
    def __init__(self, word):
        if word == "bad":
            raise ValueError("bad\nword")
        self.word = word

    async def __call__(self, request):
        await asyncio.sleep(float(request.query_params.get("seconds", 0)))
        return self.word


def build(args):
    return Echo.bind(args["word"])
