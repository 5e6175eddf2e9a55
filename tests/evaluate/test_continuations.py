"""Test of the lm-eval task that jobs/paper/continuations.py makes of a run's held-out documents."""

import json
import random
import subprocess
import sys

import pytest

from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.evaluate.harness import run_tasks
from mhmoe_ray.runs.directory import Attempt, add_attempt, create_run
from tests.checkpoint.huggingface.conftest import MODELS, export_run, make_run
from tests.data.texts import write_documents
from tests.support.specs import tiny_spec

FRACTION = 0.3
WORDS = [f"w{i}" for i in range(500)]


@pytest.mark.filterwarnings("ignore")  # lm-eval issues warnings, which would be errors
@pytest.mark.slow
def test_continuations_ask_about_held_out_documents(tmp_path, monkeypatch):
    generator = random.Random(1)
    # Only the 30 long texts give questions. The last ten have a piece after their middle, but too little text for a
    # passage before it.
    texts = [" ".join(generator.choices(WORDS, k=length)) for length in [300] * 30 + [20] * 10 + [50] * 10]
    write_documents(tmp_path / "raw/a/one.jsonl", texts)
    # All documents of this domain are copies of one text, so they give a single piece. A question needs four
    # different pieces.
    write_documents(tmp_path / "raw/b/one.jsonl", [t for t in texts[:30] if is_validation(t, FRACTION)][:1] * 20)
    run = create_run(tiny_spec(tmp_path, data={"validation_fraction": FRACTION}))
    add_attempt(run, Attempt("job-1", "http://127.0.0.1:9", local=True))
    task_folder = tmp_path / "task"
    subprocess.run([sys.executable, "jobs/paper/continuations.py", str(run.path), str(task_folder)], check=True)

    questions = [json.loads(line) for line in (task_folder / "questions.jsonl").read_text().splitlines()]
    held_out_texts = [text for text in texts[:30] if is_validation(text, FRACTION)]
    assert 4 < len(questions) == len(held_out_texts) < 30
    for question in questions:
        matching_choices = [
            i
            for i, choice in enumerate(question["choices"])
            if any(question["passage"] + choice in t for t in held_out_texts)
        ]
        assert matching_choices == [question["answer"]]
    assert len({question["answer"] for question in questions}) > 1

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    export_run(make_run(tmp_path / "model", MODELS["dense"], seq_len=512), tmp_path / "out")
    results = run_tasks(
        tmp_path / "out",
        ["continuations"],
        [str(task_folder)],
        batch_size=4,
        use_bfloat16=False,
        device="cpu",
        question_limit=None,
    )
    assert results["continuations"]["questions"] == len(questions)
