"""Fixtures: a run directory with a tiny model, written as training writes it.

One checkpoint is written by one process, and one by two expert-parallel processes.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from mhmoe_ray.checkpoint.manifest import checkpoint_name
from mhmoe_ray.cluster.spawn import free_ports
from mhmoe_ray.data.tokenizer import END_OF_TEXT
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.serving.answer import Answerer
from mhmoe_ray.serving.load import load_answerer
from mhmoe_ray.spec import ModelSpec, MoESpec, ServeSpec
from tests.support.saved import commit_checkpoint, save_tensors

SEQ_LEN = 64
# The model has more rows of embeddings than the tokenizer has tokens. This happens if a small corpus gives fewer merges
# than requested.
SPEC = ModelSpec(
    vocab_size=320, d_model=32, layers=2, attention_heads=4, d_ff=64, moe=MoESpec(heads=2, experts=4, d_expert=16)
)
TEXT = ["the quick brown fox jumps over the lazy dog", "ein älterer Jäger größte Übung", "日本語の文章", "🦊🐕🦊🐕"]


def build_tokenizer() -> Tokenizer:
    """Train a byte-level BPE tokenizer with at most 300 tokens on `TEXT`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def build_model(spec: ModelSpec = SPEC, local_experts: range | None = None) -> Decoder:
    """Return a model for inference with the same weights at each call; `local_experts` restricts it to some experts."""
    model = Decoder(spec, local_experts).requires_grad_(False).eval()
    init_weights(model, seed=7)
    for p in model.blocks.parameters():
        # With fresh weights, a model repeats the last token without end. With larger weights it gives answers in which
        # a wrong token shows.
        if p.dim() > 1:
            p.mul_(3)
    return model


def save_checkpoint(run: Path, step: int, model: Decoder, seq_len: int = SEQ_LEN) -> Path:
    """Write a checkpoint from one process, and return its folder."""
    checkpoint = run / "checkpoints" / checkpoint_name(step, 1)
    checkpoint.mkdir(parents=True)
    save_tensors(checkpoint / "weights", model.named_tensors())
    commit_checkpoint(checkpoint, model.spec, seq_len=seq_len)
    return checkpoint


def save_expert_parallel(run: Path, step: int, spec: ModelSpec) -> Path:
    """Write a checkpoint from two ranks with half of the experts each, and return its folder."""
    checkpoint = run / "checkpoints" / checkpoint_name(step, 1)
    checkpoint.mkdir(parents=True)
    mp.spawn(_save_rank, args=(free_port(), checkpoint / "weights", spec), nprocs=2)
    commit_checkpoint(checkpoint, spec, seq_len=SEQ_LEN, world=2, ep=2)
    return checkpoint


def _save_rank(rank: int, port: int, weights: Path, spec: ModelSpec) -> None:
    """Write the weights of one of two expert-parallel ranks, which has half of the experts."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    assert spec.moe is not None
    half = spec.moe.experts // 2
    tensors = {
        name: DTensor.from_local(p.detach(), mesh, [Shard(0)]) if ".experts." in name else p.detach()
        for name, p in build_model(spec, range(rank * half, (rank + 1) * half)).named_parameters()
    }
    save_tensors(weights, tensors)
    dist.destroy_process_group()


def free_port() -> int:
    return free_ports(1)[0]


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory) -> Path:
    """Return a run directory that has a tokenizer, and no checkpoint yet."""
    run = tmp_path_factory.mktemp("tiny-abc123")
    build_tokenizer().save(str(run / "tokenizer.json"))
    return run


@pytest.fixture(scope="session")
def checkpoint(run_dir) -> Path:
    return save_checkpoint(run_dir, 1, build_model())


@pytest.fixture(scope="session")
def expert_parallel_checkpoint(run_dir) -> Path:
    """Return a checkpoint with the weights of `checkpoint`, written by two processes."""
    return save_expert_parallel(run_dir, 2, SPEC)


@pytest.fixture(scope="session")
def answerer(checkpoint) -> Iterator[Answerer]:
    answerer = load_answerer(checkpoint, ServeSpec(max_concurrency=8))
    yield answerer
    answerer.engine.close()


@pytest.fixture(scope="session")
def tokenizer(run_dir) -> Tokenizer:
    return Tokenizer.from_file(str(run_dir / "tokenizer.json"))


@pytest.fixture(autouse=True, scope="session")
def _single_thread():
    torch.set_num_threads(1)


@contextmanager
def serve_app(app: FastAPI) -> Iterator[str]:
    """Serve an application in a thread during the block, and yield the server's address."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
