"""lm-eval, unmodified, on a task of ours through its Python interface."""

import json

import pytest
import torch
from tokenizers import Tokenizer

from mhmoe_ray.data.tokenizer.train import train_bpe
from mhmoe_ray.errors import SpecError
from mhmoe_ray.evaluate.harness import PAPER_TASKS, expanded, run_tasks
from tests.data.texts import documents
from tests.evaluate.test_measure import model_of

pytestmark = pytest.mark.filterwarnings("ignore")  # its own and its libraries'

QUESTIONS = [
    {"question": "the moon", "choices": [" rises", " turns home", " every"], "answer": 0},
    {"question": "a quiet", "choices": [" sea", " night falls on us all and every small boat"], "answer": 0},
    {"question": "every small boat turns home before night", "choices": [" moon", " falls"], "answer": 1},
]
TASK = """
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
SEQ_LEN = 16


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(documents("en", 60), 300)


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "choose.yaml").write_text(TASK.format(data=data))
    return tmp_path


@torch.inference_mode()
def log_probability(model, tokenizer, before, answer):
    """Return the log-probability of an answer, computed one token after another; the model sees at most SEQ_LEN
    tokens."""
    context = tokenizer.encode(before).ids
    ids, total = [0, *context], 0.0  # as in training, a text begins with its start token
    for token in tokenizer.encode(before + answer).ids[len(context) :]:
        seen = torch.tensor([ids[-SEQ_LEN:]])
        total += float(model(seen).logits_BTV[0, -1].log_softmax(-1)[token])
        ids.append(token)
    return total


@pytest.mark.long
def test_its_choices_are_those_of_the_model(folder, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    model = model_of()
    found = run_tasks(model, tokenizer, SEQ_LEN, ["choose"], [str(folder)], batch=2, half=False, limit=None)
    right, right_by_length = 0, 0
    for asked in QUESTIONS:
        fits = [log_probability(model, tokenizer, asked["question"], choice) for choice in asked["choices"]]
        by_length = [fit / len(choice) for fit, choice in zip(fits, asked["choices"], strict=True)]
        right += max(range(len(fits)), key=fits.__getitem__) == asked["answer"]
        right_by_length += max(range(len(fits)), key=by_length.__getitem__) == asked["answer"]
    assert found["choose"]["acc"] == pytest.approx(right / 3)
    assert found["choose"]["acc_norm"] == pytest.approx(right_by_length / 3)
    for name, share in (("acc", right / 3), ("acc_norm", right_by_length / 3)):
        assert found["choose"][f"{name}_stderr"] == pytest.approx((share * (1 - share) / 2) ** 0.5)


def test_a_text_begins_with_the_token_that_says_so_and_a_rolled_one_counts_each_token_once(tokenizer):
    from lm_eval.api.instance import Instance

    from mhmoe_ray.evaluate.harness import _wrapped

    model = model_of()
    wrapped = _wrapped(model, tokenizer, SEQ_LEN, 2, False)
    texts = [(q["question"], choice) for q in QUESTIONS for choice in q["choices"]]
    found = wrapped.loglikelihood([Instance("loglikelihood", {}, words, i) for i, words in enumerate(texts)])
    expected = []
    for before, answer in texts:
        context = tokenizer.encode(before).ids
        ids = tokenizer.encode(before + answer).ids[len(context) :]
        expected.append(log_probability_whole(model, [0, *context], ids, SEQ_LEN))
    assert [score for score, _ in found] == pytest.approx(expected, rel=1e-4)
    whole = [(before + answer,) for before, answer in texts]
    found = wrapped.loglikelihood_rolling([Instance("loglikelihood", {}, text, i) for i, text in enumerate(whole)])
    assert found == pytest.approx([rolled(model, tokenizer, *text) for text in whole], rel=1e-4)


@torch.inference_mode()
def rolled(model, tokenizer, text):
    """Return the log-probability of all tokens of a text, each after the tokens of its window and the one before the
    window."""
    ids, total = [0, *tokenizer.encode(text).ids], 0.0
    for i in range(1, len(ids)):
        window = (i - 1) // SEQ_LEN * SEQ_LEN
        total += float(model(torch.tensor([ids[window:i]])).logits_BTV[0, -1].log_softmax(-1)[ids[i]])
    return total


def test_log_probabilities_are_those_of_one_token_at_a_time(tokenizer):
    from mhmoe_ray.evaluate.harness import _scores

    model = model_of()
    texts = [(q["question"], choice) for q in QUESTIONS for choice in q["choices"]]
    pairs = []
    for before, answer in texts:
        context = tokenizer.encode(before).ids
        pairs.append((context, tokenizer.encode(before + answer).ids[len(context) :]))
    for seq_len in (64, 12):
        found = [value for value, _ in _scores(model, pairs, seq_len, False)]
        expected = [log_probability_whole(model, context, answer, seq_len) for context, answer in pairs]
        assert found == pytest.approx(expected, rel=1e-4)
    assert max(len(context) + len(answer) for context, answer in pairs) > 13  # one was cut at its beginning


@torch.inference_mode()
def log_probability_whole(model, context, answer, seq_len):
    ids = (context + answer)[-(seq_len + 1) :]
    logprob = model(torch.tensor([ids[:-1]])).logits_BTV[0].log_softmax(-1)
    answer = answer[-(len(ids) - 1) :]
    start = len(ids) - 1 - len(answer)
    return sum(float(logprob[start + i, token]) for i, token in enumerate(answer))


@pytest.mark.slow
def test_the_papers_tasks_are_lm_evals(tokenizer):
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    assert [task for tasks in PAPER_TASKS.values() for task in tasks if task not in known] == []
    assert expanded(["xnli", "piqa"]) == [*PAPER_TASKS["xnli"], "piqa"]
    with pytest.raises(SpecError, match="lm-eval knows none of this name"):
        run_tasks(model_of(), tokenizer, SEQ_LEN, ["no_such_task"], [], batch=1, half=False, limit=None)
