"""Test of EleutherAI's lm-eval, unmodified, with two tasks of this test against a running server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mhmoe_ray.serving.api.app import create_app
from mhmoe_ray.spec import ServeSpec
from tests.serving.conftest import build_model, serve_app

pytestmark = pytest.mark.system

QUESTIONS = [
    {"question": "the quick brown", "choices": [" fox", " dog", " lazy"], "answer": 0},
    {"question": "ein älterer", "choices": [" Jäger", " fox"], "answer": 0},
    {"question": "", "choices": ["the", "zz"], "answer": 0},
    {"question": "the lazy", "choices": [" brown", " dog"], "answer": 1},
]
CHOOSE_TASK = """
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
GO_ON_TASK = """
task: go_on
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}} the"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["zz"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory) -> Path:
    """Install lm-eval in a virtual environment of its own, and return the path of its command."""
    folder = tmp_path_factory.mktemp("lm-eval")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "-q", "lm_eval[api]"], check=True)
    return folder / "bin" / "lm_eval"


@torch.inference_mode()
def expected_scores(answerer):
    """Return the log-likelihood of each choice after its question, computed by the model itself."""
    model, scores = build_model(), []
    for item in QUESTIONS:
        encode = answerer.tokenizer.encode
        prompt_ids = encode(item["question"]).ids or [answerer.start_token]
        for choice in item["choices"]:
            full_ids = encode(item["question"] + choice).ids
            ids = full_ids if item["question"] else [answerer.start_token, *full_ids]
            logprob_TV = model(torch.tensor([ids])).logits_BTV[0, :, :300].log_softmax(-1)
            scores.append(sum(float(logprob_TV[i, ids[i + 1]]) for i in range(len(prompt_ids) - 1, len(ids) - 1)))
    return scores


def test_scores_equal_those_of_the_model(lm_eval, answerer, tmp_path):
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "choose.yaml").write_text(CHOOSE_TASK.format(data=data))
    (tmp_path / "go_on.yaml").write_text(GO_ON_TASK.format(data=data))
    with serve_app(create_app(answerer, "tiny", ServeSpec())) as url:
        arguments = f"model=tiny,base_url={url}/v1/completions,num_concurrent=4,max_retries=1"
        command = [lm_eval, "--model", "local-completions", "--model_args", arguments, "--tasks", "choose,go_on"]
        command += ["--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples"]
        result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]

    [results] = (tmp_path / "out").rglob("results_*.json")
    assert set(json.loads(results.read_text())["results"]) == {"choose", "go_on"}
    [choose_samples] = (tmp_path / "out").rglob("samples_choose_*.jsonl")
    lines = sorted(map(json.loads, choose_samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    scores = [float(answer[0]) for line in lines for answer in line["filtered_resps"]]
    assert scores == pytest.approx(expected_scores(answerer), abs=1e-3)
    [go_on_samples] = (tmp_path / "out").rglob("samples_go_on_*.jsonl")
    assert all(json.loads(line)["filtered_resps"][0] for line in go_on_samples.read_text().splitlines())
