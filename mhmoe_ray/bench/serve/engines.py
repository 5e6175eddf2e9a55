"""Engines in this process. Each is created once, and then answers a number of requests at a time."""

import asyncio
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mhmoe_ray.checkpoint.load import load_model
from mhmoe_ray.checkpoint.manifest import read_manifest
from mhmoe_ray.serve.engine import Engine, Request, Sampling
from mhmoe_ray.serve.engine.torch_engine import own_engine
from mhmoe_ray.spec import ServeSpec

NAME = "bench"
"""Name under which a model is served."""


class Place(NamedTuple):
    """Model that is served, with its precision and limits."""

    checkpoint: Path
    folder: Path
    """Folder of the same weights in the format of other packages."""
    precision: str
    threads: int
    most: int
    """Largest number of requests at a time."""

    def spec(self, engine: str) -> ServeSpec:
        sizes = {"max_concurrency": self.most, "max_waiting": 1024, "cpus_per_replica": self.threads}
        return ServeSpec.model_validate({"engine": engine, "precision": self.precision, "max_tokens": 4096, **sizes})


Prompt = tuple[list[int], int]
"""Token ids of a prompt, and the number of tokens of its answer."""
Answer = Callable[[Sequence[Prompt], int], None]
"""Function that answers all of these prompts with greedy sampling, a number of them at a time."""

NEVER = frozenset[int]()
"""Tokens that end an answer, of which there are none, so that each answer has as many tokens as requested."""


def torch_engine(place: Place) -> Answer:
    """Return our own engine."""
    torch.set_num_threads(1)  # as `load_answerer`
    model, manifest = load_model(place.checkpoint)
    known = manifest.model.vocab_size
    return _asking(own_engine(model, NEVER, known, manifest.seq_len, place.spec("torch")))


def vllm_engine(place: Place) -> Answer:
    """Return vLLM with our model."""
    from mhmoe_ray.serve.vllm.engine import VllmEngine

    manifest = read_manifest(place.checkpoint)
    known = manifest.model.vocab_size
    return _asking(VllmEngine(place.checkpoint, manifest, NEVER, known, place.spec("vllm")))


def vllm_offline(place: Place) -> Answer:
    """Return vLLM with its own Mixtral, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(place.folder),
        dtype=place.precision,
        max_num_seqs=place.most,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
    ).llm_engine
    numbers = itertools.count()

    def answer(asked: Sequence[Prompt], clients: int) -> None:
        left = list(reversed(asked))
        while left or engine.has_unfinished_requests():
            while left and engine.get_num_unfinished_requests() < clients:
                ids, tokens = left.pop()
                params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
                engine.add_request(str(next(numbers)), {"prompt_token_ids": ids}, params)
            engine.step()

    return answer


def transformers_generate(place: Place) -> Answer:
    """Return transformers' `generate`, which runs batch after batch; each batch ends with its longest answer."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(place.threads)
    model = AutoModelForCausalLM.from_pretrained(place.folder, dtype=getattr(torch, place.precision)).eval()

    @torch.inference_mode()
    def answer(asked: Sequence[Prompt], clients: int) -> None:
        for at in range(0, len(asked), clients):
            batch = asked[at : at + clients]
            longest, tokens = max(len(ids) for ids, _ in batch), max(tokens for _, tokens in batch)
            ids_BT = torch.tensor([[0] * (longest - len(ids)) + ids for ids, _ in batch])
            mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in batch])
            model.generate(
                ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )

    return answer


def _asking(engine: Engine) -> Answer:
    async def every(asked: Sequence[Prompt], clients: int) -> None:
        waiting = iter(asked)

        async def client() -> None:
            for ids, tokens in waiting:
                async for _ in engine.generate(Request(tuple(ids), Sampling(tokens, temperature=0))):
                    pass

        await asyncio.gather(*(client() for _ in range(clients)))

    return lambda asked, clients: asyncio.run(every(asked, clients))


ENGINES: dict[str, Callable[[Place], Answer]] = {
    "torch": torch_engine,
    "vllm": vllm_engine,
    "vLLM offline": vllm_offline,
    "transformers": transformers_generate,
}
