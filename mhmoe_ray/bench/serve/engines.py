"""Inference engines in this process, which are created once and then answer a number of requests at a time."""

import asyncio
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mhmoe_ray.checkpoint.load import load_model
from mhmoe_ray.checkpoint.manifest import read_manifest
from mhmoe_ray.serving.engine import Engine, Request, SamplingParams
from mhmoe_ray.serving.engine.torch_engine import own_engine
from mhmoe_ray.spec import ServeSpec

MODEL_NAME = "bench"
"""Name of the served model in requests to servers."""


class ContestModel(NamedTuple):
    """Model to serve, with its precision and limits."""

    checkpoint: Path
    folder: Path
    """Folder with the same weights in Hugging Face's layout, which vLLM and transformers read."""
    precision: str
    threads: int
    max_requests: int
    """Largest number of requests at a time."""
    ranks: int = 1
    """Ranks of vLLM, which share each layer and the threads."""
    temperature: float = 0
    """Temperature of our engines' sampling; 0 is greedy sampling."""
    top_p: float = 1

    def serve_spec(self, engine: str) -> ServeSpec:
        """Return a spec to serve the model with our engine `torch` or `vllm`."""
        sizes = {"max_concurrency": self.max_requests, "max_waiting": 1024, "max_tokens": 4096}
        cores = {"cpus_per_replica": self.threads, "tensor_parallel": self.ranks}
        return ServeSpec.model_validate({"engine": engine, "precision": self.precision, **sizes, **cores})


Prompt = tuple[list[int], int]
"""Token ids of a prompt, and the number of tokens of its answer."""
Answer = Callable[[Sequence[Prompt], int], None]
"""Function (prompts, clients) that answers all prompts, `clients` of them at a time."""

NO_STOP_TOKENS = frozenset[int]()
"""Empty set of tokens that end an answer, so that each answer has as many tokens as requested."""


def torch_engine(served_model: ContestModel) -> Answer:
    """Return a function that answers prompts with our own engine in this process."""
    # This thread gets a single OpenMP thread, as in a replica (see `load_answerer`), because more would slow down the
    # engine's own threads.
    torch.set_num_threads(1)
    model, manifest = load_model(served_model.checkpoint)
    vocab_size = manifest.model.vocab_size
    return _answer_with(
        own_engine(model, NO_STOP_TOKENS, vocab_size, manifest.seq_len, served_model.serve_spec("torch")), served_model
    )


def vllm_engine(served_model: ContestModel) -> Answer:
    """Return a function that answers prompts with vLLM and our implementation of the model."""
    from mhmoe_ray.serving.vllm.engine import VllmEngine

    manifest = read_manifest(served_model.checkpoint)
    vocab_size = manifest.model.vocab_size
    return _answer_with(
        VllmEngine(served_model.checkpoint, manifest, NO_STOP_TOKENS, vocab_size, served_model.serve_spec("vllm")),
        served_model,
    )


def vllm_offline(served_model: ContestModel) -> Answer:
    """Return a function that answers prompts with vLLM and its own implementation of Mixtral, in this process."""
    # By default vLLM runs its engine in another process. This variable keeps the engine in this process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(served_model.folder),
        dtype=served_model.precision,
        max_num_seqs=served_model.max_requests,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
    ).llm_engine
    request_numbers = itertools.count()

    def answer(prompts: Sequence[Prompt], clients: int) -> None:
        pending_prompts = list(reversed(prompts))
        while pending_prompts or engine.has_unfinished_requests():
            while pending_prompts and engine.get_num_unfinished_requests() < clients:
                ids, tokens = pending_prompts.pop()
                params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
                engine.add_request(str(next(request_numbers)), {"prompt_token_ids": ids}, params)
            engine.step()

    return answer


def transformers_generate(served_model: ContestModel) -> Answer:
    """Return a function that answers prompts with transformers' `generate`, one batch at a time.

    A batch ends with its longest answer.
    """
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(served_model.threads)
    model = AutoModelForCausalLM.from_pretrained(
        served_model.folder, dtype=getattr(torch, served_model.precision)
    ).eval()

    @torch.inference_mode()
    def answer(prompts: Sequence[Prompt], clients: int) -> None:
        for start in range(0, len(prompts), clients):
            batch = prompts[start : start + clients]
            max_length, tokens = max(len(ids) for ids, _ in batch), max(tokens for _, tokens in batch)
            # Padding is on the left, because `generate` continues a prompt at its right end.
            ids_BT = torch.tensor([[0] * (max_length - len(ids)) + ids for ids, _ in batch])
            mask_BT = torch.tensor([[0] * (max_length - len(ids)) + [1] * len(ids) for ids, _ in batch])
            model.generate(
                ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )

    return answer


def _answer_with(engine: Engine, served_model: ContestModel) -> Answer:

    async def answer_all(prompts: Sequence[Prompt], clients: int) -> None:
        pending_prompts = iter(prompts)

        # All clients share one iterator, so each client takes the next prompt that no other client has taken.
        async def client() -> None:
            for ids, tokens in pending_prompts:
                params = SamplingParams(
                    max_tokens=tokens, temperature=served_model.temperature, top_p=served_model.top_p
                )
                async for _ in engine.generate(Request(tuple(ids), params)):
                    pass

        await asyncio.gather(*(client() for _ in range(clients)))

    return lambda prompts, clients: asyncio.run(answer_all(prompts, clients))


ENGINES: dict[str, Callable[[ContestModel], Answer]] = {
    "torch": torch_engine,
    "vllm": vllm_engine,
    "vLLM offline": vllm_offline,
    "transformers": transformers_generate,
}
