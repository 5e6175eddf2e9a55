"""Tests of evaluations that the run directory already holds, and of requests for evaluations that it does not hold."""

import dataclasses
import inspect
import os
from pathlib import Path

import pytest
from typer.main import get_command

import mhmoe_ray as mh
from mhmoe_ray.api.evaluation import EvaluationOptions
from mhmoe_ray.cli.app import app
from mhmoe_ray.cli.eval import OPTION_NAMES
from mhmoe_ray.errors import ClusterError, DataError, RunError, SpecError
from mhmoe_ray.evaluate.request import EvalRequest, Evaluation, save_evaluation
from mhmoe_ray.evaluate.score import Score
from mhmoe_ray.runs.directory import mark_imported
from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run

NOWHERE = "http://127.0.0.1:1"
"""Address without a cluster: an evaluation there fails unless the run directory holds it."""
CHECKPOINT = "step_00000007.1"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return mh.Run(make_run(tmp_path_factory.mktemp("evaluation"), MIXTRAL))


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Return a file of raw text in the current directory."""
    monkeypatch.chdir(tmp_path)
    file = Path("heldout.txt")
    file.write_text("a line of text\n" * 1000)
    return file


def store_evaluation(run, request):
    """Store an evaluation that answers the request, and return it."""
    score = Score(nats=8.0, tokens=4, text_bytes=9)
    figures = {"domains": {"heldout.txt/all": score}, "languages": {}, "routing": {}, "tasks": {}}
    evaluation = Evaluation(request=request, step=7, tokens=448, seconds=1.0, **figures)
    save_evaluation(run.directory, evaluation)
    return evaluation


def test_an_evaluation_is_repeated_when_its_text_has_changed(run, text):
    evaluation = store_evaluation(run, EvaluationOptions(text=text).request(run.directory, CHECKPOINT))
    notes = []
    for paths in (str(text), text, [str(text)], [text], (text.absolute(),)):
        assert run.evaluate(paths, checkpoint=7, on_note=notes.append, address=NOWHERE) == evaluation
    expected_note = f"it was evaluated before, in {run.directory.evaluations}; `mhmoe eval --again` or recompute=True"
    assert [note.startswith(expected_note) for note in notes] == [True] * 5
    # The new text has the size and the beginning of the old one.
    time = text.stat().st_mtime
    text.write_text("a line of text\n" * 999 + "another line !\n")
    os.utime(text, (time + 1, time + 1))
    with pytest.raises(ClusterError):
        run.evaluate(str(text), address=NOWHERE)
    Path("more").mkdir()
    Path("more/a.txt").write_text("some text\n")
    key = EvaluationOptions(text="more").request(run.directory, CHECKPOINT).key
    assert EvaluationOptions(text="more").request(run.directory, CHECKPOINT).key == key
    Path("more/b.txt").write_text("some text\n")
    assert EvaluationOptions(text="more").request(run.directory, CHECKPOINT).key != key


def test_a_changed_chat_template_changes_the_key(run, tmp_path):
    conversation = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    (tmp_path / "talk").mkdir()
    (tmp_path / "talk/a.jsonl").write_text(conversation)
    template = tmp_path / "template.jinja"
    template.touch()
    keys = set()
    for time in (1, 2):
        os.utime(template, (time, time))
        overrides = ["data.sources.talk.format=chat", f"data.chat_template={template}"]
        keys.add(EvaluationOptions(text=tmp_path / "talk", overrides=overrides).request(run.directory, CHECKPOINT).key)
    assert len(keys) == 2


def test_evaluations_without_text_keep_their_key():
    request = EvalRequest(
        run="r",
        checkpoint=CHECKPOINT,
        prepared="p",
        text=None,
        samples=0,
        tasks=["arc_easy"],
        task_folders=[],
        limit=None,
        batch=1,
        half=False,
        cpus=1,
        gpus=0,
    )
    assert request.key == "step_00000007.1-633b17ea"


def test_missing_text_is_an_error_before_a_job_starts(run, text):
    for paths in ("nofile.txt", ["nofile.txt"]):
        with pytest.raises(DataError, match=r"source nofile\.txt: there is no file or folder .*/nofile\.txt; correct"):
            run.evaluate(paths, address=NOWHERE)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"samples": 3}, "overrides and samples are about text; name some"),
        ({"limit": 3}, "limit and task_folders are about tasks; name some"),
        ({"probe": "pictures"}, "probe classifies the images of text; name some"),
        ({"text": "a", "probe": "b"}, "probe classifies images by an encoder, and this model is none; leave it out"),
        ({"prior": "uniform"}, "this model has no experts of domains; leave it out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(run, options, reason):
    with pytest.raises(SpecError, match=reason):
        run.evaluate(**options, address=NOWHERE)


def test_every_option_can_be_given_in_python_and_on_the_command_line():
    fields = {field.name for field in dataclasses.fields(EvaluationOptions)}
    assert fields <= set(inspect.signature(mh.Run.evaluate).parameters)
    flags = {flag for parameter in get_command(app).commands["eval"].params for flag in parameter.opts}
    assert {OPTION_NAMES[field] for field in fields} <= flags


def test_a_single_task_is_a_task(run):
    assert EvaluationOptions(tasks="arc_easy").request(run.directory, CHECKPOINT).tasks == ["arc_easy"]
    request = EvaluationOptions(tasks=["rte"], task_folders="own").request(run.directory, CHECKPOINT)
    assert request.task_folders == [str(Path("own").absolute())]


def test_an_imported_run_needs_text_or_tasks(tmp_path):
    directory = make_run(tmp_path, MIXTRAL)
    mark_imported(directory)
    with pytest.raises(RunError, match="it was imported and has no held-out text; name some text or tasks"):
        mh.Run(directory).evaluate()


def test_an_evaluation_is_shown_by_its_figures(run, text):
    evaluation = store_evaluation(run, EvaluationOptions(text=text).request(run.directory, CHECKPOINT))
    assert repr(evaluation) == str(evaluation) == f"Evaluation('{run.id}/{CHECKPOINT}', loss=2.0000, perplexity=7.389)"
    tasks = {"rte": {"acc,none": 0.5}}
    with_tasks = evaluation.model_copy(update={"domains": {}, "tasks": tasks})
    assert str(with_tasks) == f"Evaluation('{run.id}/{CHECKPOINT}', tasks={tasks})"


def test_changed_files_of_tasks_make_another_request(tmp_path, run):
    folder = tmp_path / "tasks"
    (folder / "data").mkdir(parents=True)
    (folder / "mine.yaml").write_text("task: mine")
    (folder / "data" / "questions.jsonl").write_text("{}")

    def request_key():
        return EvaluationOptions(tasks="mine", task_folders=folder).request(run.directory, CHECKPOINT).key

    keys = [request_key(), request_key()]
    (folder / "data" / "questions.jsonl").write_text("[]")
    keys.append(request_key())
    assert [keys.index(key) for key in keys] == [0, 0, 2]


def test_resources_of_an_evaluation_are_no_keys_of_its_text(run, text):
    with pytest.raises(
        SpecError, match="has the CPUs and GPUs of one of the run's workers; remove it; the number of GPUs"
    ):
        EvaluationOptions(text=text, overrides=["cluster.cpus_per_worker=3"]).request(run.directory, CHECKPOINT)
