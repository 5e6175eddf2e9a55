"""`mhmoe eval` where the run directory already has the answer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mhmoe_ray.bench.serve.model import plain_model, write_run
from mhmoe_ray.cli.eval import _task_rows, evaluation_of, make_request
from mhmoe_ray.errors import DataError
from mhmoe_ray.evaluate.request import Evaluation, RoutingCounts, store
from mhmoe_ray.evaluate.score import Score
from mhmoe_ray.runs.directory import Attempt, RunDir, add_attempt, create_run, mark_imported
from tests.runs.test_runs import write_checkpoint
from tests.specs import tiny_spec


def test_a_stored_answer_is_shown_without_torch_and_ray(tmp_path):
    run = RunDir(tmp_path / "bench-000000")
    write_run(plain_model(64, 1, 2, 1, 32), 16, tmp_path / "bench-000000")
    mark_imported(run)
    (tmp_path / "one.txt").write_text("some text\n")
    request = make_request(run, None, [str(tmp_path / "one.txt")], [], None, [], [], None, None)
    counts = RoutingCounts(
        tokens=4, counts=[[4, 0]], tokens_of=[[4, 0]], distinct=[[0, 4]], agreement=[[[4]]], first_weight=[4.0]
    )
    score = Score(nats=8.0, tokens=4, text_bytes=9)
    answer = {"domains": {"a": score}, "languages": {}, "routing": {"a": counts}, "tasks": {}}
    store(run, Evaluation(request=request, step=1, tokens=0, seconds=1.0, **answer))
    code = (
        "import sys\n"
        f"sys.argv = ['mhmoe', 'eval', {str(run.path)!r}, '--text', {str(tmp_path / 'one.txt')!r}, '--json']\n"
        "from mhmoe_ray.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'ray'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["figures"]["total"]["all"]["loss"] == 2.0
    assert done.stderr.splitlines()[-1] == "set()"


def test_a_stored_answer_on_held_out_text_is_shown_where_that_text_is_no_more(tmp_path):
    run = create_run(tiny_spec(tmp_path))
    add_attempt(run, Attempt(f"{run.id}-1", "http://127.0.0.1:1", local=True))
    write_checkpoint(run, 1)
    request = make_request(run, None, [], [], None, [], [], None, None)
    score = Score(nats=8.0, tokens=4, text_bytes=9)
    answer = {"domains": {"a": score}, "languages": {}, "routing": {}, "tasks": {}}
    made = Evaluation(request=request, step=1, tokens=0, seconds=1.0, **answer)
    store(run, made)
    assert request.prepared
    assert not Path(request.prepared).exists()
    assert evaluation_of(run, request, again=False, address=None) == made
    with pytest.raises(DataError, match="prepared"):
        evaluation_of(run, request, again=True, address=None)


def test_scores_of_tasks_stand_beside_their_standard_errors():
    result = {"questions": 1200, "acc": 0.5, "acc_stderr": 0.0144, "match,strict": 0.25, "match_stderr,strict": 0.0125}
    assert _task_rows({"choose": {**result, "word_perplexity": 12.0}, "group": {"acc": 0.75}}) == [
        ["choose", "1,200", "acc", "0.5000", "0.0144"],
        ["choose", "1,200", "match,strict", "0.2500", "0.0125"],
        ["choose", "1,200", "word_perplexity", "12.0000", "-"],
        ["group", "-", "acc", "0.7500", "-"],
    ]
