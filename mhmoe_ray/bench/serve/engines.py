"""Engines in this process. Each is made once, and then answers prompts that are there at once."""

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mhmoe_ray.runs.manifest import read_manifest
from mhmoe_ray.serve.engine import Engine, Request, Sampling
from mhmoe_ray.serve.load import load_model
from mhmoe_ray.serve.load import torch_engine as own_engine
from mhmoe_ray.spec import ServeSpec


class Place(NamedTuple):
    """What is served, and how."""

    checkpoint: Path
    folder: Path
    """The same weights as other tools read them."""
    precision: str
    threads: int
    most: int
    """Requests at a time."""

    def spec(self, engine: str) -> ServeSpec:
        sizes = {"max_concurrency": self.most, "max_waiting": 1024, "cpus_per_replica": self.threads}
        return ServeSpec.model_validate({"engine": engine, "precision": self.precision, "max_tokens": 4096, **sizes})


Prompts = Sequence[Sequence[int]]
Answer = Callable[[Prompts, int], None]
"""All prompts, each with so many tokens, greedily."""

NEVER = frozenset[int]()
"""Tokens that end an answer: each has as many as asked for."""


def torch_engine(place: Place) -> Answer:
    """Our own."""
    model, manifest = load_model(place.checkpoint)
    known = manifest.model.vocab_size
    return _asking(own_engine(model, NEVER, known, manifest.seq_len, place.spec("torch")))


def vllm_engine(place: Place) -> Answer:
    """vLLM with our model."""
    from mhmoe_ray.serve.vllm.engine import VllmEngine

    manifest = read_manifest(place.checkpoint)
    known = manifest.model.vocab_size
    return _asking(VllmEngine(place.checkpoint, manifest, NEVER, known, place.spec("vllm")))


def vllm_offline(place: Place) -> Answer:
    """vLLM as it comes, with its own Mixtral, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(place.folder),
        dtype=place.precision,
        max_num_seqs=place.most,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
    )

    def answer(prompts: Prompts, tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)

    return answer


def transformers_generate(place: Place) -> Answer:
    """transformers' `generate` on a batch of prompts of one length."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place.folder, dtype=getattr(torch, place.precision)).eval()

    def answer(prompts: Prompts, tokens: int) -> None:
        ids_BT = torch.tensor(prompts)
        with torch.inference_mode():
            model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )

    return answer


def _asking(engine: Engine) -> Answer:
    async def one(ids: Sequence[int], tokens: int) -> None:
        async for _ in engine.generate(Request(tuple(ids), Sampling(tokens, temperature=0))):
            pass

    async def every(prompts: Prompts, tokens: int) -> None:
        await asyncio.gather(*(one(ids, tokens) for ids in prompts))

    return lambda prompts, tokens: asyncio.run(every(prompts, tokens))


ENGINES: dict[str, Callable[[Place], Answer]] = {
    "torch": torch_engine,
    "vllm": vllm_engine,
    "vLLM offline": vllm_offline,
    "transformers": transformers_generate,
}
