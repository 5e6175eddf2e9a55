"""Steps of packed documents with padding: the loss of the whole step, on any number of ranks."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mhmoe_ray.checkpoint.load import restore
from mhmoe_ray.checkpoint.manifest import read_manifest
from mhmoe_ray.model.decoder import Decoder, routing_loss, token_losses
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.runs.directory import create_run
from mhmoe_ray.spec import RunSpec
from tests.ranks import run_ranks
from tests.specs import tiny_spec
from tests.train import jobs

STEPS = 6
MODELS = {"llama": {}, "subln": {"backbone": "subln"}}


def spec_of(workers=1, ep=1, masks=True, folder=Path("/nowhere"), **model) -> RunSpec:
    model = {"document_masks": masks, **model}
    return tiny_spec(folder, model=model, data={"packing": "best_fit"}, cluster={"workers": workers, "ep": ep})


def plainly(spec: RunSpec) -> tuple[dict[str, torch.Tensor], float, int]:
    """Return gradients and loss of the first step, and the number of targets that it counts.

    Each document goes by itself through a model without masks, which has no padding to count. The routing losses are
    those of the micro-batches, padding included.
    """
    plain, packed = Decoder(spec.model.model_copy(update={"document_masks": False})), Decoder(spec.model)
    for model in (plain, packed):
        init_weights(model, spec.seed)
    losses, routing = [], []
    for token_BT, counts_BT in jobs.micro_batches(spec, 0):
        document_BT = token_BT[:, :-1].eq(jobs.START).cumsum(1)
        routing.append(routing_loss(spec.model, packed(token_BT[:, :-1], document_BT=document_BT).routing))
        for token_T, count, document_T in zip(token_BT, counts_BT.sum(1).tolist(), document_BT, strict=True):
            for length in document_T[:count].unique(return_counts=True)[1].tolist():
                alone, token_T = token_T[: length + 1], token_T[length:]
                losses.append(token_losses(plain(alone[None, :-1]).logits_BTV, alone[None, 1:]).flatten())
    loss = torch.cat(losses)
    (loss.mean() + torch.stack(routing).mean()).backward()
    both = zip(plain.named_parameters(), packed.named_parameters(), strict=True)
    gradients = {name: sum(t.grad for t in (p, q) if t.grad is not None) for (name, p), (_, q) in both}
    return gradients, loss.mean().item(), len(loss)


@pytest.mark.parametrize("model", MODELS)
def test_one_process_steps_as_if_documents_were_alone_and_nothing_padded(model):
    spec = spec_of(**MODELS[model])
    gradients, loss, targets = plainly(spec)
    [found] = run_ranks(1, jobs.gradients_then_losses, spec, 1)
    assert found["tokens"] == targets < 0.6 * spec.tokens_per_step
    assert found["losses"] == pytest.approx([loss], rel=1e-5)
    for name, expected in gradients.items():
        assert (found["gradients"][name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.fixture(scope="module")
def alone():
    return run_ranks(1, jobs.gradients_then_losses, spec_of(), STEPS)[0]


@pytest.mark.parametrize(("workers", "ep"), [(2, 1), (2, 2), (4, 2)])
def test_padding_however_spread_over_ranks_changes_nothing(alone, workers, ep):
    """One of the four ranks has nothing but padding, and one has a single target."""
    for found in run_ranks(workers, jobs.gradients_then_losses, spec_of(workers, ep), STEPS):
        for name, expected in alone["gradients"].items():
            assert (found["gradients"][name] - expected).norm() <= 1e-5 * expected.norm(), name
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert found["norms"] == pytest.approx(alone["norms"], rel=1e-3)
        assert found["tokens"] == alone["tokens"]


def test_a_resumed_run_goes_on_counting_tokens_without_padding(tmp_path):
    spec = spec_of(masks=False, folder=tmp_path)
    run = create_run(spec)
    for file in (run.tokenizer_file, spec.data.prepared / "manifest.json"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    jobs.train_and_save(spec, run.path, 2)
    [checkpoint] = run.checkpoints.iterdir()
    trainer = jobs.trainer_of(spec)
    restore(trainer, checkpoint, read_manifest(checkpoint))
    for done in (2, 3):
        counts = [counts_BT.sum() for step in range(done) for _, counts_BT in jobs.micro_batches(spec, step)]
        assert trainer.tokens == sum(counts) < done * spec.tokens_per_step
        sums = trainer.accumulate(jobs.batches(spec, done, trainer))
        trainer.update(sums)


def test_a_step_of_padding_alone_is_no_number_divided_by_zero():
    spec = spec_of()
    trainer = jobs.trainer_of(spec)
    padding = [batch._replace(counts_BT=torch.zeros_like(batch.counts_BT)) for batch in jobs.micro_batches(spec, 0)]
    sums = trainer.accumulate(padding)
    norm = trainer.update(sums).norm
    assert (sums.loss, sums.targets, trainer.tokens, trainer.step) == (0, 0, 0, 1)
    assert 0 < norm < float("inf")  # routing has losses of its own


def test_validation_masks_documents_as_training_does():
    """Packed documents have the same validation loss as each of them in a sample of its own."""
    spec = spec_of()
    samples = [torch.cat(part) for part in zip(*jobs.micro_batches(spec, 0), strict=True)]
    packed = jobs.trainer_of(spec).validate(*samples)
    tokens, counts = [], []
    for token_T, counts_T in zip(*samples, strict=True):
        starts = [*token_T[:-1].eq(jobs.START).nonzero().flatten().tolist(), spec.data.seq_len]
        for start, end in pairwise(starts):
            shift = torch.arange(spec.data.seq_len + 1)
            tokens.append(torch.where(shift <= end - start, token_T.roll(-start), 0))
            counts.append((shift[:-1] < end - start) & counts_T.roll(-start))
    loss, number = jobs.trainer_of(spec_of(masks=False)).validate(torch.stack(tokens), torch.stack(counts))
    assert packed == (pytest.approx(loss, rel=1e-5), number)
    assert number == int(samples[1].sum())
