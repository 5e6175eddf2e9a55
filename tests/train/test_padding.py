"""Tests of steps with packed documents and padding, on any number of ranks."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mhmoe_ray.checkpoint.load import restore
from mhmoe_ray.checkpoint.manifest import read_manifest
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.loss import token_losses
from mhmoe_ray.model.trunk import routing_loss
from mhmoe_ray.runs.directory import create_run
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.train.objectives import MicroBatch
from tests.support.ranks import run_ranks
from tests.support.specs import tiny_spec
from tests.train import jobs

STEPS = 6
MODELS = {"llama": {}, "subln": {"backbone": "subln"}}


def padded_spec(workers=1, ep=1, masks=True, folder=Path("/nowhere"), **model) -> RunSpec:
    """Return a tiny spec with best-fit packing, so that samples have several documents and padding."""
    model = {"document_masks": masks, **model}
    return tiny_spec(folder, model=model, data={"packing": "best_fit"}, cluster={"workers": workers, "ep": ep})


def train_single_documents(spec: RunSpec) -> tuple[dict[str, torch.Tensor], float, int]:
    """Return gradients and loss of the first step, and the number of its targets that count.

    They are computed without packing: each document is a sample of its own for a model without masks, so there is no
    padding. Only the routing losses are those of the packed micro-batches, padding included.
    """
    plain_model, packed_model = Decoder(spec.model.model_copy(update={"document_masks": False})), Decoder(spec.model)
    for model in (plain_model, packed_model):
        init_weights(model, spec.seed)
    losses, routing = [], []
    for token_BT, counts_BT, *_ in jobs.micro_batches(spec, 0):
        document_BT = token_BT[:, :-1].eq(jobs.START_TOKEN).cumsum(1)
        routing.append(routing_loss(spec.model, packed_model(token_BT[:, :-1], document_BT=document_BT).routing))
        for token_T, count, document_T in zip(token_BT, counts_BT.sum(1).tolist(), document_BT, strict=True):
            for length in document_T[:count].unique(return_counts=True)[1].tolist():
                sample_T, token_T = token_T[: length + 1], token_T[length:]
                losses.append(token_losses(plain_model(sample_T[None, :-1]).logits_BTV, sample_T[None, 1:]).flatten())
    loss = torch.cat(losses)
    (loss.mean() + torch.stack(routing).mean()).backward()
    parameter_pairs = zip(plain_model.named_parameters(), packed_model.named_parameters(), strict=True)
    gradients = {name: sum(t.grad for t in (p, q) if t.grad is not None) for (name, p), (_, q) in parameter_pairs}
    return gradients, loss.mean().item(), len(loss)


@pytest.mark.parametrize("model", MODELS)
def test_packed_step_equals_step_of_single_documents(model):
    spec = padded_spec(**MODELS[model])
    gradients, loss, targets = train_single_documents(spec)
    [result] = run_ranks(1, jobs.train_and_collect, spec, 1)
    assert result["tokens"] == targets < 0.6 * spec.tokens_per_step
    assert result["losses"] == pytest.approx([loss], rel=1e-5)
    for name, expected in gradients.items():
        assert (result["gradients"][name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.fixture(scope="module")
def reference():
    return run_ranks(1, jobs.train_and_collect, padded_spec(), STEPS)[0]


@pytest.mark.parametrize(("workers", "ep"), [(2, 1), (2, 2), (4, 2)])
def test_distribution_of_padding_over_ranks_changes_nothing(reference, workers, ep):
    """One of the four ranks has only padding, and one has a single target."""
    for result in run_ranks(workers, jobs.train_and_collect, padded_spec(workers, ep), STEPS):
        for name, expected in reference["gradients"].items():
            assert (result["gradients"][name] - expected).norm() <= 1e-5 * expected.norm(), name
        assert result["losses"] == pytest.approx(reference["losses"], rel=1e-4)
        assert result["norms"] == pytest.approx(reference["norms"], rel=1e-3)
        assert result["tokens"] == reference["tokens"]


def test_resumed_run_counts_tokens_without_padding(tmp_path):
    spec = padded_spec(masks=False, folder=tmp_path)
    run = create_run(spec)
    for file in (run.tokenizer_file, spec.data.prepared / "manifest.json"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    jobs.train_and_save(spec, run.path, 2)
    [checkpoint] = run.checkpoints.iterdir()
    trainer = jobs.build_trainer(spec)
    restore(trainer, checkpoint, read_manifest(checkpoint))
    for step_count in (2, 3):
        counts = [counts_BT.sum() for step in range(step_count) for _, counts_BT, *_ in jobs.micro_batches(spec, step)]
        assert trainer.tokens == sum(counts) < step_count * spec.tokens_per_step
        sums = trainer.accumulate(jobs.rank_batches(spec, step_count, trainer))
        trainer.update(sums)


def test_step_of_padding_only_is_finite():
    spec = padded_spec()
    trainer = jobs.build_trainer(spec)
    padding = [batch._replace(counts_BT=torch.zeros_like(batch.counts_BT)) for batch in jobs.micro_batches(spec, 0)]
    sums = trainer.accumulate(padding)
    norm = trainer.update(sums).norm
    assert (sums.loss, sums.targets, trainer.tokens, trainer.step) == (0, 0, 0, 1)
    assert 0 < norm < float("inf")  # not 0, because routing has losses of its own


def test_validation_masks_documents_as_training_does():
    """Packed documents have the same validation loss as the same documents in samples of their own."""
    spec = padded_spec()
    batches = jobs.micro_batches(spec, 0)
    samples = [torch.cat([batch.token_BT for batch in batches]), torch.cat([batch.counts_BT for batch in batches])]
    packed_result = jobs.build_trainer(spec).objective.validate_part(MicroBatch(*samples))
    tokens, counts = [], []
    for token_T, counts_T in zip(*samples, strict=True):
        starts = [*token_T[:-1].eq(jobs.START_TOKEN).nonzero().flatten().tolist(), spec.data.seq_len]
        for start, end in pairwise(starts):
            shift = torch.arange(spec.data.seq_len + 1)
            tokens.append(torch.where(shift <= end - start, token_T.roll(-start), 0))
            counts.append((shift[:-1] < end - start) & counts_T.roll(-start))
    loss, target_count = jobs.build_trainer(padded_spec(masks=False)).objective.validate_part(
        MicroBatch(torch.stack(tokens), torch.stack(counts))
    )
    assert packed_result == (pytest.approx(loss, rel=1e-5), target_count)
    assert target_count == int(samples[1].sum())
