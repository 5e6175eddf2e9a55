"""Tests of lm-eval on exported checkpoints, with small tasks that this module defines."""

import pytest
import torch

from mhmoe_ray.checkpoint.load import load_model
from mhmoe_ray.checkpoint.manifest import newest_checkpoint
from mhmoe_ray.errors import SpecError
from mhmoe_ray.evaluate.harness import PAPER_TASKS, expand_tasks, run_tasks
from mhmoe_ray.serving.engine import SamplingParams
from mhmoe_ray.serving.load import load_answerer
from mhmoe_ray.spec import ServeSpec
from tests.checkpoint.huggingface.conftest import MODELS, export_run, make_run
from tests.serving.asking import answer_tokens
from tests.support.harness_tasks import CHOICE_TASK, QUESTIONS, write_task

# lm-eval and its libraries issue warnings, which pytest would turn into errors.
pytestmark = pytest.mark.filterwarnings("ignore")

GENERATION_TASK = """
task: continue
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{text}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["</s>", "<s>"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(
    scope="module", params=["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("torchscale", "dense"))]
)
def run(request, tmp_path_factory):
    """Return a run and the folder of its export."""
    folder = tmp_path_factory.mktemp("run")
    run = make_run(folder, MODELS[request.param])
    export_run(run, folder / "out")
    return run, folder / "out"


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def run_task(folder, name, task_folder, **options):
    options = {"batch_size": 2, "use_bfloat16": False, "device": "cpu", "question_limit": None, **options}
    return run_tasks(folder, [name], [str(task_folder)], **options)[name]


@torch.inference_mode()
def log_probability(model, answerer, question, answer):
    """Return the log-probability of an answer to a question, after the token that starts a document."""
    ids, total = answerer.encode(question), 0.0
    for token in answerer.encode(question + answer)[len(ids) :]:
        total += float(model(torch.tensor([ids])).logits_BTV[0, -1].log_softmax(-1)[token])
        ids.append(token)
    return total


@pytest.mark.long
def test_lm_eval_chooses_as_the_model_does(run, tmp_path):
    checkpoint = newest_checkpoint(run[0], ("weights",))[0]
    model, answerer = load_model(checkpoint)[0], load_answerer(checkpoint, ServeSpec())
    results = run_task(run[1], "choose", write_task(tmp_path, CHOICE_TASK, QUESTIONS))
    correct_count, normalized_correct_count = 0, 0
    for question in QUESTIONS:
        scores = [log_probability(model, answerer, question["question"], choice) for choice in question["choices"]]
        normalized_scores = [score / len(choice) for score, choice in zip(scores, question["choices"], strict=True)]
        correct_count += max(range(len(scores)), key=scores.__getitem__) == question["answer"]
        normalized_correct_count += max(range(len(scores)), key=normalized_scores.__getitem__) == question["answer"]
    assert results["questions"] == 3
    assert results["acc"] == pytest.approx(correct_count / 3)
    assert results["acc_norm"] == pytest.approx(normalized_correct_count / 3)
    for name, accuracy in (("acc", correct_count / 3), ("acc_norm", normalized_correct_count / 3)):
        assert results[f"{name}_stderr"] == pytest.approx((accuracy * (1 - accuracy) / 2) ** 0.5)
    answerer.engine.close()


@pytest.mark.slow  # the quick test of lm-eval is the one above, with multiple choice
def test_generated_text_is_that_of_the_engine(run, tmp_path):
    """The targets of two of three questions are the texts that our engine generates, so two answers count as right."""
    answerer = load_answerer(newest_checkpoint(run[0], ("weights",))[0], ServeSpec())
    questions = []
    for question in QUESTIONS:
        answer = answer_tokens(
            answerer.engine, answerer.encode(question["question"]), SamplingParams(max_tokens=6, temperature=0)
        )
        questions.append({"question": question["question"], "text": answerer.tokenizer.decode(answer)})
    questions[1]["text"] += " something else"
    results = run_task(run[1], "continue", write_task(tmp_path, GENERATION_TASK, questions))
    assert results["exact_match"] == pytest.approx(2 / 3)
    answerer.engine.close()


@pytest.mark.slow
def test_expand_tasks_returns_tasks_of_lm_eval(run, tmp_path):
    from lm_eval.tasks import TaskManager

    known_tasks = TaskManager().all_tasks
    assert [task for tasks in PAPER_TASKS.values() for task in tasks if task not in known_tasks] == []
    assert expand_tasks(["xnli", "piqa"]) == [*PAPER_TASKS["xnli"], "piqa"]
    with pytest.raises(SpecError, match="lm-eval has no task of this name"):
        run_task(run[1], "no_such_task", tmp_path)
