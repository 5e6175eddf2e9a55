"""Tests of exports in the tools of other projects, with the oldest version of transformers that exports work with.

The tools are in an environment without this project (`make test-tools`), which runs `use_export.py`.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from mhmoe_ray.checkpoint.huggingface.import_ import import_folder
from mhmoe_ray.checkpoint.load import load_model
from mhmoe_ray.checkpoint.manifest import newest_checkpoint
from mhmoe_ray.evaluate.harness import run_tasks
from mhmoe_ray.serving.engine import SamplingParams
from mhmoe_ray.serving.load import load_answerer
from mhmoe_ray.spec import ServeSpec
from tests.checkpoint.huggingface.conftest import DENSE, MODELS, export_run, make_run
from tests.checkpoint.huggingface.use_export import PROMPTS, TOKENS
from tests.serving.asking import answer_tokens
from tests.support.harness_tasks import CHOICE_TASK, QUESTIONS, write_task

PYTHON = Path(__file__).parents[3] / ".venv-tools" / "bin" / "python"
pytestmark = [
    pytest.mark.system,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason="run make test-tools, which installs the tools"),
]
SCRIPT = Path(__file__).with_name("use_export.py")
EXPORTS = {
    "dense": MODELS["dense"],
    "mixtral": MODELS["mixtral"],
    "h 2, llama": MODELS["llama"],
    "h 4, subln, X-MoE": MODELS["xmoe"].with_moe(MODELS["xmoe"].moe.model_copy(update={"heads": 4})),
    "all": MODELS["all"],
}
assert DENSE["vocab_size"] == 320  # TOKENS has ids below this number


@pytest.fixture(scope="module", params=EXPORTS)
def tool_results(request, tmp_path_factory):
    """Return a run, the folder that has its export in out/ and the tools' output in seen/, and the tools' results."""
    folder = tmp_path_factory.mktemp("tools")
    run = make_run(folder, EXPORTS[request.param])
    export_run(run, folder / "out")
    (folder / "task").mkdir()
    write_task(folder / "task", CHOICE_TASK, QUESTIONS)
    (folder / "seen").mkdir()
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [str(PYTHON), "-W", "ignore", str(SCRIPT), *(str(folder / name) for name in ("out", "seen", "task"))]
    subprocess.run(command, check=True, env=environment, cwd=folder, stdin=subprocess.DEVNULL)
    return run, folder, torch.load(folder / "seen" / "seen.pt", weights_only=False)


@torch.no_grad()
def test_logits_and_greedy_answers_are_ours(tool_results):
    run, _, observations = tool_results
    checkpoint = newest_checkpoint(run, ("weights",))[0]
    model = load_model(checkpoint)[0]
    document_BT = torch.zeros_like(TOKENS) if model.spec.document_masks else None
    torch.testing.assert_close(
        observations["logits"], model(TOKENS, document_BT=document_BT).logits_BTV, rtol=0, atol=1e-5
    )
    answerer = load_answerer(checkpoint, ServeSpec(max_concurrency=1))
    params = SamplingParams(max_tokens=32, temperature=0, logit_bias={1: -100.0, 2: -100.0})
    for prompt, answer in zip(PROMPTS, observations["answers"], strict=True):
        assert answer_tokens(answerer.engine, answerer.encode(prompt), params) == answer
    answerer.engine.close()


def test_ten_steps_of_each_trainer_have_a_finite_loss(tool_results):
    losses = tool_results[2]["losses"]
    assert losses.keys() == {"trainer", "sft", "lora", "reward"}
    # The two texts of a pair have similar scores at first, so the loss is near ln 2, which is 0.7.
    assert 0 < losses.pop("reward") < 2
    # The loss of the random model begins near ln 320, which is 5.8.
    assert all(3 < loss < 9 for loss in losses.values()), losses


def test_lm_eval_gives_the_figures_of_mhmoe_eval(tool_results, monkeypatch, tmp_path):
    _, folder, observations = tool_results
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    our_results = run_tasks(
        folder / "out",
        ["choose"],
        [str(folder / "task")],
        batch_size=1,
        use_bfloat16=False,
        device="cpu",
        question_limit=None,
    )["choose"]
    for name in ("acc", "acc_norm"):
        assert observations["evaluation"][f"{name},none"] == pytest.approx(our_results[name], abs=1e-4)


def test_tuned_model_comes_back_and_is_exported_again(tool_results, tmp_path):
    run, folder, _ = tool_results
    tuned_run = import_folder(folder / "seen" / "tuned", "tuned", tmp_path / "runs", None)
    before_tuning, after_tuning = (newest_checkpoint(r, ("weights",)) for r in (run, tuned_run))
    assert after_tuning[1].model == before_tuning[1].model
    old_tensors, new_tensors = (
        load_model(checkpoint)[0].named_tensors() for checkpoint, *_ in (before_tuning, after_tuning)
    )
    assert any(not torch.equal(old_tensors[name], new_tensors[name]) for name in old_tensors)
    export_run(tuned_run, tmp_path / "again")
    second_run = import_folder(tmp_path / "again", "again", tmp_path / "runs", None)
    newest_tensors = load_model(newest_checkpoint(second_run, ("weights",))[0])[0].named_tensors()
    assert all(torch.equal(newest_tensors[name], new_tensors[name]) for name in newest_tensors)
