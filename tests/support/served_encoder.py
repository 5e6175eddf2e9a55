"""Small encoders for tests of serving: a run with a checkpoint, images, and an engine that waits for the test."""

import asyncio
import base64
import threading

import numpy as np

from mhmoe_ray.checkpoint.manifest import checkpoint_name
from mhmoe_ray.families.encoder.serving.engine import EncoderEngine
from mhmoe_ray.model.build import build_model
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.runs.directory import create_run
from tests.serving.conftest import build_tokenizer
from tests.support.encoders import ENCODER, encoder_spec
from tests.support.images import encode_image
from tests.support.saved import commit_checkpoint, save_tensors

SEQ_LEN = 12
SOURCES = {**ENCODER["data"]["sources"], "written": {"path": "/nowhere/written", "format": "webdataset"}}
CAPTIONS = {"captions_of": {"sources": ["written"], "micro_batch_size": 2, "objective": "caption"}}


def make_encoder_run(folder, *, writes_captions=True, d_match=8):
    """Return a run with a checkpoint of an encoder with random weights, and the model."""
    parts = {name: part for name, part in ENCODER["data"]["parts"].items() if d_match or name != "match"}
    sources = {name: source for name, source in SOURCES.items() if d_match or name != "matched"}
    if writes_captions:
        parts |= CAPTIONS
    else:
        del sources["written"]
    spec = encoder_spec(
        storage=str(folder / "runs"),
        data__parts=parts,
        data__sources=sources,
        data__prepared=str(folder / "prepared"),
        train__micro_batch_size=sum(part["micro_batch_size"] for part in parts.values()),
        model__encoder__d_match=d_match,
    )
    run = create_run(spec)
    build_tokenizer().save(str(run.tokenizer_file))
    model = build_model(spec.model).eval().requires_grad_(False)
    init_weights(model, 3)
    checkpoint = run.checkpoints / checkpoint_name(1, 1)
    checkpoint.mkdir(parents=True)
    save_tensors(checkpoint / "weights", model.named_tensors())
    commit_checkpoint(checkpoint, spec.model, seed=3, seq_len=SEQ_LEN)
    return run, model


class SteppedEngine(EncoderEngine):
    """Engine that computes a round only once a test allows it."""

    def __init__(self, *args):
        self._allowed_rounds = threading.Semaphore(0)
        super().__init__(*args)

    def _compute(self, inputs):
        self._allowed_rounds.acquire()
        return super()._compute(inputs)

    def allow_rounds(self, count):
        for _ in range(count):
            self._allowed_rounds.release()

    async def run_rounds(self, count):
        """Let the engine compute `count` rounds, and wait until they are computed."""
        steps = self.stats().steps + count
        self.allow_rounds(count)
        while self.stats().steps < steps:
            await asyncio.sleep(0.01)


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


IMAGES = [encode_image(np.random.default_rng(n).integers(0, 256, (20, 24, 3), np.uint8)) for n in range(5)]


URLS = [data_url(image) for image in IMAGES]


def endless_model(encoder):
    """Return a model whose captions never end by themselves."""
    run, _ = encoder
    model = build_model(run.spec().model).eval().requires_grad_(False)
    init_weights(model, 3)
    model.output["text"].bias[0] = -1e4
    return model
