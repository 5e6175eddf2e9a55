"""Tests of direct preference optimization: the losses and gradients of TRL, and the stored reference."""

import random
from functools import partial

import numpy as np
import pytest
import torch

from mhmoe_ray.checkpoint.huggingface.export import export
from mhmoe_ray.checkpoint.manifest import stored_manifest
from mhmoe_ray.data.chat.encoder import ConversationEncoder
from mhmoe_ray.data.chat.template import BUILT_IN_TEMPLATE, ChatTemplate
from mhmoe_ray.data.prepare.packing import pack_pairs
from mhmoe_ray.data.shards.columns import SAMPLE, columns_of, padding_token
from mhmoe_ray.data.sources.preferences import pair_of
from mhmoe_ray.data.tokenizer import END_OF_TEXT
from mhmoe_ray.data.tokenizer.train import train_bpe
from mhmoe_ray.runs.directory import Attempt, add_attempt, create_run
from tests.support.ranks import run_ranks
from tests.support.saved import commit_checkpoint, save_tensors
from tests.support.specs import tiny_spec
from tests.train import jobs

WORDS = "the sea is blue and a boat sails over it while we look at birds".split()
SEQ_LEN, BETA = 160, 0.3
MOE = {"heads": 1, "experts": 4, "top_k": 2, "d_expert": 24, "every": 1, "normalize_gates": True, "balance_weight": 0}


def random_records(count):
    """Return random pairs as TRL's conversational data sets have them."""
    rng = random.Random(0)

    def message(role):
        return {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(2, 9)))}

    prompts = [[message("user")] + [message("assistant"), message("user")] * rng.randint(0, 1) for _ in range(count)]
    return [{"prompt": p, "chosen": [message("assistant")], "rejected": [message("assistant")]} for p in prompts]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([" ".join(WORDS), "User:\nAssistant:\nSystem:\n"] * 4, 300)


def make_samples(tokenizer, records):
    """Return the stored samples of pairs, of which none is cut."""
    template, encoder = ChatTemplate(BUILT_IN_TEMPLATE, END_OF_TEXT, END_OF_TEXT), ConversationEncoder(tokenizer)
    pairs = [pair_of(1, record, "", template) for record in records]
    conversations = encoder.encode([c for pair in pairs for c in (pair.conversation, pair.rejected)])
    packed = pack_pairs(np.concatenate([c.rows(2) for c in conversations]), SEQ_LEN, 0, padding_token(2))
    assert packed.whole_documents == len(records)
    return packed.samples


def dpo_spec(folder, micro_batches, **sections):
    data = {"sources": {"p": {"path": "raw", "format": "preferences"}}, "packing": "best_fit", "seq_len": SEQ_LEN}
    train = {"steps": 4, "micro_batches": micro_batches, "micro_batch_size": 5, "dpo": {"beta": BETA}, "lr": 1e-3}
    model = {"document_masks": True, "tied_embeddings": False, "moe": MOE, "d_ff": None}
    return tiny_spec(folder, **{"model": model, "data": data, "train": train, "start": {"from": "base"}, **sections})


def export_weights(trainer, tokenizer, folder):
    """Write the model's weights as transformers reads them, and return the folder."""
    run = create_run(trainer.spec.model_copy(update={"storage": folder}))
    add_attempt(run, Attempt("job", "", local=True))
    checkpoint = run.checkpoints / "step_00000001.1"
    checkpoint.mkdir()
    tokenizer.save(str(run.tokenizer_file))
    run.chat_template_file.write_text(BUILT_IN_TEMPLATE)
    save_tensors(checkpoint / "weights", trainer.model.named_tensors())
    commit_checkpoint(checkpoint, trainer.spec.model, seq_len=SEQ_LEN)
    export(checkpoint, stored_manifest(checkpoint), folder / "exported")
    return folder / "exported"


def compute_references(trainer, samples):
    objective = trainer.objective
    objective.references = objective._log_probabilities(
        len(samples), lambda numbers: objective._micro_batch(samples[numbers], None)
    )


def our_batches(trainer, samples):
    size = trainer.spec.train.micro_batch_size
    rows = {**columns_of(samples), SAMPLE: np.arange(len(samples))}
    return [
        trainer.objective.receive({name: values[i : i + size] for name, values in rows.items()})[1]
        for i in range(0, len(samples), size)
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")  # of TRL
def test_loss_and_gradients_are_those_of_trl(tmp_path, tokenizer, monkeypatch):
    """TRL tokenizes the same records with the exported tokenizer, and computes with the exported models."""
    import datasets
    import transformers
    from trl import DPOConfig, DPOTrainer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    records = random_records(50)
    samples = make_samples(tokenizer, records)
    trainer = jobs.build_trainer(dpo_spec(tmp_path, 10))
    reference_folder = export_weights(trainer, tokenizer, tmp_path / "reference")
    compute_references(trainer, samples)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    policy_folder = export_weights(trainer, tokenizer, tmp_path / "policy")
    sums = trainer.accumulate(our_batches(trainer, samples))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.copy_(parameter.grad)
    gradient_folder = export_weights(trainer, tokenizer, tmp_path / "gradients")

    # An embedding's padding token, here the start token too, would have no gradient.
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, pad_token_id=None)
    arguments = DPOConfig(
        str(tmp_path), beta=BETA, per_device_train_batch_size=50, bf16=False, use_cpu=True, report_to=[],
        max_length=None, disable_dropout=False, activation_checkpointing=False,
    )  # fmt: skip
    peer_tokenizer = transformers.AutoTokenizer.from_pretrained(policy_folder)
    # A rendered conversation begins with a start token here, and TRL adds none.
    peer_tokenizer.chat_template = "{{ bos_token }}" + BUILT_IN_TEMPLATE
    peer = DPOTrainer(
        load(policy_folder),
        load(reference_folder),
        arguments,
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=peer_tokenizer,
    )
    assert peer.model.config.model_type == "mixtral"
    [inputs] = peer.get_train_dataloader()
    loss = peer.compute_loss(peer.model.train(), inputs)
    loss.backward()
    assert abs(loss.item() - 0.6931) > 0.01
    assert trainer.objective.step_loss(sums.loss, 0, sums.part_sums_P2) == pytest.approx(loss.item(), rel=1e-5)
    figures = dict(zip(trainer.spec.loss_names, (sums.part_sums_P2[:, 0] / 50).tolist(), strict=True))
    for name, value in figures.items():
        assert value == pytest.approx(np.mean(peer._metrics["train"][f"rewards/{name}"]), rel=1e-4, abs=1e-5), name
    for (name, gradient), parameter in zip(
        load(gradient_folder).named_parameters(), peer.model.parameters(), strict=True
    ):
        assert (parameter.grad - gradient).norm() <= 1e-5 * parameter.grad.norm(), name


def train_pairs(spec, samples):
    """Train on all samples in each step; return the references, the first gradients, and the losses of all steps."""
    trainer, losses, gradients = jobs.build_trainer(spec), [], {}
    compute_references(trainer, samples)
    batches = our_batches(trainer, samples)[trainer.mesh.rank :: trainer.mesh.world_size]
    for step in range(spec.train.steps):
        sums = trainer.accumulate(batches)
        if step == 0:
            gradients = jobs.full_gradients(trainer)
        losses.append(trainer._step_loss(sums))
        trainer.update(sums)
    return trainer.objective.references, gradients, losses


@pytest.mark.parametrize(
    ("ep", "strategy"),
    [(2, "ddp"), (1, "fsdp"), *(pytest.param(1, name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "zero3"))],
)
def test_two_ranks_train_like_one_process(tmp_path, tokenizer, ep, strategy):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    samples = make_samples(tokenizer, random_records(20))
    [(references, gradients, losses)] = run_ranks(1, train_pairs, dpo_spec(tmp_path, 4), samples)
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert losses[-1] < 0.6
    spec = dpo_spec(tmp_path, 4, cluster={"workers": 2, "ep": ep, "strategy": strategy})
    for rank_references, rank_gradients, rank_losses in run_ranks(2, train_pairs, spec, samples):
        np.testing.assert_allclose(rank_references, references, rtol=1e-5)
        assert rank_losses == pytest.approx(losses, rel=1e-4)
        for name, gradient in gradients.items():
            assert (rank_gradients[name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-9, name
