"""Tests of `mhmoe eval` where the evaluation is already stored in the run directory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mhmoe_ray.api.checkpoints import pick_checkpoint
from mhmoe_ray.api.evaluation import EvaluationOptions, evaluate
from mhmoe_ray.bench.serve.model import plain_model, write_run
from mhmoe_ray.cli.eval import _task_rows
from mhmoe_ray.errors import DataError
from mhmoe_ray.evaluate.request import Evaluation, RoutingCounts, save_evaluation
from mhmoe_ray.evaluate.score import Score
from mhmoe_ray.runs.directory import Attempt, RunDir, add_attempt, create_run, mark_imported
from tests.support.saved import write_checkpoint
from tests.support.specs import tiny_spec


def newest_name(run):
    """Return the name of the newest checkpoint of a run."""
    return pick_checkpoint(run, verify_hashes=False)[0].name


def test_stored_evaluation_is_shown_without_torch_and_ray(tmp_path):
    run = RunDir(tmp_path / "bench-000000")
    write_run(plain_model(64, 1, 2, 1, 32), 16, tmp_path / "bench-000000")
    mark_imported(run)
    (tmp_path / "one.txt").write_text("some text\n")
    request = EvaluationOptions(text=[str(tmp_path / "one.txt")]).request(run, newest_name(run))
    counts = RoutingCounts(
        tokens=4, counts=[[4, 0]], tokens_of=[[4, 0]], distinct=[[0, 4]], agreement=[[[4]]], first_weight=[4.0]
    )
    score = Score(nats=8.0, tokens=4, text_bytes=9)
    figures = {"domains": {"a": score}, "languages": {}, "routing": {"a": counts}, "tasks": {}}
    save_evaluation(run, Evaluation(request=request, step=1, tokens=0, seconds=1.0, **figures))
    code = (
        "import sys\n"
        f"sys.argv = ['mhmoe', 'eval', {str(run.path)!r}, '--text', {str(tmp_path / 'one.txt')!r}, '--json']\n"
        "from mhmoe_ray.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'ray'} & set(sys.modules), file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(process.stdout)["figures"]["total"]["all"]["loss"] == 2.0
    assert process.stderr.splitlines()[-1] == "set()"


def test_stored_evaluation_is_shown_after_its_held_out_text_is_gone(tmp_path):
    run = create_run(tiny_spec(tmp_path))
    add_attempt(run, Attempt(f"{run.id}-1", "http://127.0.0.1:1", local=True))
    write_checkpoint(run, 1)
    request = EvaluationOptions().request(run, newest_name(run))
    score = Score(nats=8.0, tokens=4, text_bytes=9)
    figures = {"domains": {"a": score}, "languages": {}, "routing": {}, "tasks": {}}
    evaluation = Evaluation(request=request, step=1, tokens=0, seconds=1.0, **figures)
    save_evaluation(run, evaluation)
    assert request.prepared
    assert not Path(request.prepared).exists()
    assert evaluate(run, None, EvaluationOptions()) == evaluation
    with pytest.raises(DataError, match="prepared"):
        evaluate(run, None, EvaluationOptions(), recompute=True)


def test_task_scores_have_their_standard_errors():
    result = {"questions": 1200, "acc": 0.5, "acc_stderr": 0.0144, "match,strict": 0.25, "match_stderr,strict": 0.0125}
    assert _task_rows({"choose": {**result, "word_perplexity": 12.0}, "group": {"acc": 0.75}}) == [
        ["choose", "1,200", "acc", "0.5000", "0.0144"],
        ["choose", "1,200", "match,strict", "0.2500", "0.0125"],
        ["choose", "1,200", "word_perplexity", "12.0000", "-"],
        ["group", "-", "acc", "0.7500", "-"],
    ]
