"""Tests of lm-eval, unmodified and through its Python interface, on a task of these tests."""

import json

import pytest
import torch
from tokenizers import Tokenizer

from mhmoe_ray.data.tokenizer.train import train_bpe
from mhmoe_ray.errors import SpecError
from mhmoe_ray.evaluate.harness import PAPER_TASKS, expand_tasks, run_tasks
from tests.data.texts import make_documents
from tests.evaluate.test_measure import make_model

# lm-eval and its libraries issue warnings, which pytest would turn into errors.
pytestmark = pytest.mark.filterwarnings("ignore")

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
    return train_bpe(make_documents("en", 60), 300)


@pytest.fixture
def task_folder(tmp_path):
    data_path = tmp_path / "questions.jsonl"
    data_path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "choose.yaml").write_text(TASK.format(data=data_path))
    return tmp_path


@torch.inference_mode()
def log_probability(model, tokenizer, question, answer):
    """Return the log-probability of an answer to a question, with at most SEQ_LEN tokens before each of its tokens."""
    context = tokenizer.encode(question).ids
    ids, total = [0, *context], 0.0  # as in training, a text begins with the start token, 0
    for token in tokenizer.encode(question + answer).ids[len(context) :]:
        input_ids = torch.tensor([ids[-SEQ_LEN:]])
        total += float(model(input_ids).logits_BTV[0, -1].log_softmax(-1)[token])
        ids.append(token)
    return total


@pytest.mark.long
def test_run_tasks_chooses_as_the_model_does(task_folder, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(task_folder / "hf"))
    model = make_model()
    results = run_tasks(
        model, tokenizer, SEQ_LEN, ["choose"], [str(task_folder)], batch_size=2, use_bfloat16=False, question_limit=None
    )
    correct_count, normalized_correct_count = 0, 0
    for question in QUESTIONS:
        scores = [log_probability(model, tokenizer, question["question"], choice) for choice in question["choices"]]
        normalized_scores = [score / len(choice) for score, choice in zip(scores, question["choices"], strict=True)]
        correct_count += max(range(len(scores)), key=scores.__getitem__) == question["answer"]
        normalized_correct_count += max(range(len(scores)), key=normalized_scores.__getitem__) == question["answer"]
    assert results["choose"]["acc"] == pytest.approx(correct_count / 3)
    assert results["choose"]["acc_norm"] == pytest.approx(normalized_correct_count / 3)
    for name, accuracy in (("acc", correct_count / 3), ("acc_norm", normalized_correct_count / 3)):
        assert results["choose"][f"{name}_stderr"] == pytest.approx((accuracy * (1 - accuracy) / 2) ** 0.5)


def test_lm_eval_model_scores_each_token_once_after_a_start_token(tokenizer):
    from lm_eval.api.instance import Instance

    from mhmoe_ray.evaluate.harness import _lm_eval_model

    model = make_model()
    lm_eval_model = _lm_eval_model(model, tokenizer, SEQ_LEN, 2, False)
    texts = [(q["question"], choice) for q in QUESTIONS for choice in q["choices"]]
    results = lm_eval_model.loglikelihood([Instance("loglikelihood", {}, words, i) for i, words in enumerate(texts)])
    expected = []
    for question, answer in texts:
        context = tokenizer.encode(question).ids
        ids = tokenizer.encode(question + answer).ids[len(context) :]
        expected.append(full_log_probability(model, [0, *context], ids, SEQ_LEN))
    assert [score for score, _ in results] == pytest.approx(expected, rel=1e-4)
    full_texts = [(question + answer,) for question, answer in texts]
    results = lm_eval_model.loglikelihood_rolling(
        [Instance("loglikelihood", {}, text, i) for i, text in enumerate(full_texts)]
    )
    assert results == pytest.approx([rolling_log_probability(model, tokenizer, *text) for text in full_texts], rel=1e-4)


@torch.inference_mode()
def rolling_log_probability(model, tokenizer, text):
    """Return the log-probability of a text in windows of SEQ_LEN tokens, computed token by token.

    Each token follows the earlier tokens of its window and the last token before the window.
    """
    ids, total = [0, *tokenizer.encode(text).ids], 0.0
    for i in range(1, len(ids)):
        window = (i - 1) // SEQ_LEN * SEQ_LEN
        total += float(model(torch.tensor([ids[window:i]])).logits_BTV[0, -1].log_softmax(-1)[ids[i]])
    return total


def test_score_batch_equals_scoring_one_continuation_at_a_time(tokenizer):
    from mhmoe_ray.evaluate.harness import _score_batch

    model = make_model()
    texts = [(q["question"], choice) for q in QUESTIONS for choice in q["choices"]]
    pairs = []
    for question, answer in texts:
        context = tokenizer.encode(question).ids
        pairs.append((context, tokenizer.encode(question + answer).ids[len(context) :]))
    for seq_len in (64, 12):
        results = [log_probability for log_probability, _ in _score_batch(model, pairs, seq_len, False)]
        expected = [full_log_probability(model, context, answer, seq_len) for context, answer in pairs]
        assert results == pytest.approx(expected, rel=1e-4)
    # At least one pair is longer than 12 + 1 tokens, so it was cut.
    assert max(len(context) + len(answer) for context, answer in pairs) > 13


@torch.inference_mode()
def full_log_probability(model, context, answer, seq_len):
    """Return the log-probability of an answer from one forward pass over the last `seq_len` + 1 tokens of the whole."""
    ids = (context + answer)[-(seq_len + 1) :]
    logprob = model(torch.tensor([ids[:-1]])).logits_BTV[0].log_softmax(-1)
    answer = answer[-(len(ids) - 1) :]
    start = len(ids) - 1 - len(answer)
    return sum(float(logprob[start + i, token]) for i, token in enumerate(answer))


@pytest.mark.slow
def test_expand_tasks_returns_tasks_of_lm_eval(tokenizer):
    from lm_eval.tasks import TaskManager

    known_tasks = TaskManager().all_tasks
    assert [task for tasks in PAPER_TASKS.values() for task in tasks if task not in known_tasks] == []
    assert expand_tasks(["xnli", "piqa"]) == [*PAPER_TASKS["xnli"], "piqa"]
    with pytest.raises(SpecError, match="lm-eval has no task of this name"):
        run_tasks(
            make_model(),
            tokenizer,
            SEQ_LEN,
            ["no_such_task"],
            [],
            batch_size=1,
            use_bfloat16=False,
            question_limit=None,
        )
