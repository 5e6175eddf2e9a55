"""Tests of training on conversations: the loss of a step, validation, and a model that learns to end its turns."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from mhmoe_ray.data.chat.encoder import ConversationEncoder
from mhmoe_ray.data.chat.template import BUILT_IN_TEMPLATE, ChatTemplate
from mhmoe_ray.data.prepare.packing import pack_best_fit
from mhmoe_ray.data.shards.columns import DOCUMENT_STARTS, TARGETS, TOKENS, padding_token, to_model_samples
from mhmoe_ray.data.tokenizer import END_OF_TEXT
from mhmoe_ray.data.tokenizer.train import train_bpe
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.loss import token_losses
from mhmoe_ray.serving.api.app import create_app
from mhmoe_ray.spec import RunSpec, ServeSpec
from mhmoe_ray.train.objectives import MicroBatch
from mhmoe_ray.train.objectives.next_token import micro_batch
from tests.serving.asking import call
from tests.serving.own import create_answerer
from tests.support.specs import tiny_spec
from tests.train import jobs

CPU = torch.device("cpu")
COLOURS = ["red", "blue", "green", "white", "black", "brown"]
THINGS = ["sea", "sky", "grass", "moon", "night", "boat", "house", "road"]


def make_conversations() -> list[list[dict[str, str]]]:
    """Return conversations of one and of two exchanges, whose answers follow from the questions."""
    conversations = []
    for i, thing in enumerate(THINGS):
        for j, colour in enumerate(COLOURS):
            messages = [
                {"role": "user", "content": f"Is the {thing} {colour}?"},
                {"role": "assistant", "content": f"Yes, the {thing} is {colour}."},
            ]
            if (i + j) % 2:
                messages += [
                    {"role": "user", "content": "Are you sure?"},
                    {"role": "assistant", "content": f"I am, it is {colour}."},
                ]
            conversations.append(messages)
    return conversations


@pytest.fixture(autouse=True, scope="module")
def _single_thread():
    """Compute with one thread: steps of this size are many times slower where threads wait for each other."""
    thread_count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(thread_count)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [f"User:\n{a['content']}\nAssistant:\n{b['content']}" for a, b, *_ in make_conversations()]
    return train_bpe(texts, 300)


@pytest.fixture(scope="module")
def template():
    return ChatTemplate(BUILT_IN_TEMPLATE, END_OF_TEXT, END_OF_TEXT)


@pytest.fixture(scope="module")
def encoded(tokenizer, template):
    """Return the tokens of each conversation. The start token is the end token, too, as with our tokenizers."""
    conversations = [template.render_conversation(messages) for messages in make_conversations()]
    return ConversationEncoder(tokenizer).encode(conversations)


def chat_spec(**model) -> RunSpec:
    sources = {"chat": {"path": "raw", "format": "chat"}}
    data = {"sources": sources, "packing": "best_fit", "seq_len": 96}
    return tiny_spec(model={"document_masks": True, **model}, data=data, train={"steps": 60, "lr": 6e-3})


def make_batches(spec: RunSpec, encoded, step: int) -> list[MicroBatch]:
    """Return the micro-batches of a step: packed samples of all conversations, whose order depends on the step."""
    order = np.random.default_rng(step).permutation(len(encoded))
    rows = np.concatenate([encoded[i].rows(2) for i in order])
    samples = pack_best_fit(rows, spec.data.seq_len, 0, padding_token(2)).samples[: spec.samples_per_step]
    parts = np.split(samples, spec.train.micro_batches)
    return [micro_batch(to_model_samples(part, 2), CPU) for part in parts]


def losses_by_conversation(model: Decoder, batches: list[MicroBatch]) -> list[torch.Tensor]:
    """Return the losses of the targets of each conversation, which are computed from this conversation alone."""
    losses = []
    for token_BT, counts_BT, document_starts_BT, *_ in batches:
        for token_T, counts_T, starts_T in zip(token_BT, counts_BT, document_starts_BT, strict=True):
            starts = [*starts_T.nonzero().flatten().tolist(), len(counts_T)]
            for start, stop in pairwise(starts):
                logits = model(token_T[None, start:stop]).logits_BTV
                losses.append(token_losses(logits, token_T[None, start + 1 : stop + 1])[0][counts_T[start:stop]])
    return losses


def test_step_has_the_loss_of_the_assistants_tokens_alone(encoded):
    """Packed conversations of several turns train as each does alone, although turns end with the start token."""
    spec = chat_spec(moe=None, d_ff=48)
    batches = make_batches(spec, encoded, 0)
    plain_model = Decoder(spec.model.model_copy(update={"document_masks": False}))
    init_weights(plain_model, spec.seed)
    loss = torch.cat(losses_by_conversation(plain_model, batches))
    loss.mean().backward()
    trainer = jobs.build_trainer(spec)
    sums = trainer.accumulate(batches)
    assert sums.targets == len(loss) == int(sum(batch.counts_BT.sum() for batch in batches))
    assert 0.2 < sums.targets / sum(batch.counts_BT.numel() for batch in batches) < 0.6
    assert sums.loss / sums.targets == pytest.approx(loss.mean().item(), rel=1e-5)
    for (name, parameter), plain_parameter in zip(
        trainer.model.named_parameters(), plain_model.parameters(), strict=True
    ):
        assert (parameter.grad - plain_parameter.grad).norm() <= 2e-5 * plain_parameter.grad.norm(), name


def test_targets_of_a_step_are_those_of_its_conversations(encoded):
    """All conversations fit into one step of this spec, and each of their targets is in it once."""
    spec = chat_spec()
    rows = np.concatenate([conversation.rows(2) for conversation in encoded])
    samples = pack_best_fit(rows, spec.data.seq_len, 0, padding_token(2)).samples
    batch = micro_batch(to_model_samples(samples, 2), CPU)
    targets = batch.token_BT[:, 1:][batch.counts_BT].tolist()
    assert sorted(targets) == sorted(rows[TOKENS][rows[TARGETS]].tolist())
    assert int(samples[DOCUMENT_STARTS][:, :-1].sum()) >= len(encoded)


def test_validation_is_over_the_assistants_tokens(encoded):
    spec = chat_spec(moe=None, d_ff=48)
    batches = make_batches(spec, encoded, 1)[:3]
    model = Decoder(spec.model.model_copy(update={"document_masks": False}))
    init_weights(model, spec.seed)
    with torch.no_grad():
        loss = torch.cat(losses_by_conversation(model, batches))
    columns = [[getattr(batch, name) for batch in batches] for name in MicroBatch._fields[:3]]
    held_out_batch = MicroBatch(*map(torch.cat, columns))
    expected = pytest.approx(loss.mean().item(), rel=1e-5), len(loss)
    assert jobs.build_trainer(spec).objective.validate_part(held_out_batch) == expected


@pytest.mark.long
def test_model_learns_to_end_its_turns(encoded, tokenizer, template):
    """A model that is trained from random weights answers through the API and ends its turns by itself."""
    spec = chat_spec()
    trainer = jobs.build_trainer(spec)
    for step in range(spec.train.steps):
        trainer.update(trainer.accumulate(make_batches(spec, encoded, step)))
    model = trainer.model.requires_grad_(False).eval()
    answerer = create_answerer(model, tokenizer, spec.data.seq_len, ServeSpec(max_tokens=64), template)
    app = create_app(answerer, "tiny", ServeSpec(max_tokens=64))
    answers, finish_reasons = [], []
    try:
        for messages, conversation in zip(make_conversations()[::3], encoded[::3], strict=True):
            # The server's prompt has the tokens of training, up to the last answer.
            prompt_ids = answerer.encode_chat(template, messages[:-1])
            assert prompt_ids == conversation.token_ids[: len(prompt_ids)].tolist()
            assert conversation.target_mask[len(prompt_ids) :].all()
            body = {"messages": messages[:-1], "temperature": 0, "max_tokens": 40}
            [choice] = call(app, "POST", "/v1/chat/completions", json=body).json()["choices"]
            finish_reasons.append(choice["finish_reason"])
            answers.append((choice["message"]["content"], messages[-1]["content"]))
    finally:
        answerer.engine.close()
    assert finish_reasons.count("stop") >= 0.95 * len(answers)
    # At least 90 % of the answers begin with the same four characters as the assistant's in the conversations.
    assert sum(answer[:4] == expected[:4] for answer, expected in answers) >= 0.9 * len(answers)
