"""The task that jobs/paper/continuations.py makes of a run's held-out documents."""

import json
import random
import subprocess
import sys

import pytest
from tokenizers import Tokenizer

from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.evaluate.harness import run_tasks
from mhmoe_ray.runs.directory import Attempt, add_attempt, create_run
from tests.checkpoint.huggingface.conftest import TEXT
from tests.data.texts import write_documents
from tests.evaluate.test_measure import model_of
from tests.llama_tokenizer import llama_tokenizer
from tests.specs import tiny_spec

FRACTION = 0.3
WORDS = [f"w{i}" for i in range(500)]


@pytest.mark.filterwarnings("ignore")  # lm-eval's
@pytest.mark.slow
def test_right_choices_go_on_with_their_passage_in_documents_that_are_held_out_and_lm_eval_asks_them(
    tmp_path, monkeypatch
):
    chance = random.Random(1)
    texts = [
        " ".join(chance.choices(WORDS, k=length)) for length in [300] * 30 + [20] * 10 + [50] * 10
    ]  # the last of half a passage and a piece
    write_documents(tmp_path / "raw/a/one.jsonl", texts)
    write_documents(
        tmp_path / "raw/b/one.jsonl", [t for t in texts[:30] if is_validation(t, FRACTION)][:1] * 20
    )  # too alike to ask of
    run = create_run(tiny_spec(tmp_path, data={"validation_fraction": FRACTION}))
    add_attempt(run, Attempt("job-1", "http://127.0.0.1:9", local=True))
    made = tmp_path / "task"
    subprocess.run([sys.executable, "jobs/paper/continuations.py", str(run.path), str(made)], check=True)

    questions = [json.loads(line) for line in (made / "questions.jsonl").read_text().splitlines()]
    kept = [text for text in texts[:30] if is_validation(text, FRACTION)]
    assert 4 < len(questions) == len(kept) < 30
    for asked in questions:
        fitting = [i for i, choice in enumerate(asked["choices"]) if any(asked["passage"] + choice in t for t in kept)]
        assert fitting == [asked["answer"]]
    assert len({asked["answer"] for asked in questions}) > 1

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    tokenizer: Tokenizer = llama_tokenizer(TEXT, 300)
    found = run_tasks(model_of(), tokenizer, 16, ["continuations"], [str(made)], batch=4, half=False, limit=None)
    assert found["continuations"]["questions"] == len(questions)
