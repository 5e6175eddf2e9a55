"""Tests of `mhmoe generate`, which generates text from a checkpoint in its own process, without a cluster."""

import subprocess

import pytest
import torch

from mhmoe_ray.checkpoint.manifest import newest_checkpoint
from mhmoe_ray.cli.generate import generate
from mhmoe_ray.errors import ServeError
from mhmoe_ray.serving.engine import SamplingParams
from mhmoe_ray.serving.engine.sampler import Sampler
from mhmoe_ray.serving.load import load_answerer
from mhmoe_ray.spec import ServeSpec
from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run
from tests.cli.run import assert_one_line, command, mhmoe
from tests.serving.asking import answer_pieces


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a project folder and the trained run in it."""
    folder = tmp_path_factory.mktemp("project")
    return folder, make_run(folder, MIXTRAL)


def test_generate_prints_the_text_of_the_engine(project):
    folder, run = project
    answerer = load_answerer(newest_checkpoint(run, ("weights",))[0], ServeSpec())
    sampling = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.8, seed=4)
    text = "".join(piece.text for piece in answer_pieces(answerer, answerer.encode("the quick"), sampling))
    answerer.engine.close()
    options = ("--max-tokens", "12", "--temperature", "0.9", "--top-p", "0.8", "--seed", "4")
    result = mhmoe(folder, "generate", run.id, "--prompt", "the quick", *options)
    assert (result.code, result.out) == (0, f"{text}\n")
    report = mhmoe(folder, "generate", "--prompt", "the quick", *options, "--json").json()
    assert (report["text"], report["tokens"], report["finish_reason"]) == (text, 12, "length")
    assert (report["run"], report["checkpoint"], report["step"]) == (run.id, "step_00000007.1", 7)


def test_prompt_can_come_through_a_pipe(project):
    folder, _ = project
    piped_process = subprocess.run(
        command("generate", "--temperature", "0", "--max-tokens", "4"),
        cwd=folder,
        input="the quick",
        capture_output=True,
        text=True,
        check=True,
    )
    result = mhmoe(folder, "generate", "--prompt", "the quick", "--temperature", "0", "--max-tokens", "4")
    assert piped_process.stdout == result.out


def test_mistakes_are_one_line(project):
    folder, run = project
    long_prompt_result = mhmoe(folder, "generate", "--prompt", "the quick brown fox " * 100)
    assert_one_line(long_prompt_result, ServeError.exit_code, "the prompt: it has", "shorten it")
    assert_one_line(mhmoe(folder, "generate", run.id, "--prompt", "a", "--checkpoint", "step_9.9"), 8, "step_9.9")
    top_p_result = mhmoe(folder, "generate", "--prompt", "a", "--top-p", "0")
    assert (top_p_result.code, "--top-p 0: nothing is left to draw from" in top_p_result.err) == (2, True)


def test_prompt_that_is_not_utf_8_is_one_line(project):
    folder, _ = project
    message = "error: the prompt: it is not UTF-8; give it as UTF-8"
    for words, stdin in ((["--prompt", b"the \xe9"], b""), ([], b"the \xe9")):
        process = subprocess.run([*command("generate"), *words], cwd=folder, input=stdin, capture_output=True)
        assert (process.returncode, process.stderr.decode().splitlines()) == (ServeError.exit_code, [message])


def test_engine_failure_is_one_line(project, monkeypatch):
    def fail(*_):
        raise MemoryError("all of it is taken")

    folder, run = project
    monkeypatch.setattr(Sampler, "sample", fail)
    with pytest.raises(ServeError, match=r"^the engine: MemoryError: all of it is taken; try another checkpoint"):
        generate(run.id, prompt="the quick", storage=str(folder / "runs"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_missing_gpu_is_one_line(project):
    result = mhmoe(project[0], "generate", "--prompt", "a", "--gpus", "1")
    assert_one_line(result, ServeError.exit_code, "--gpus 1: torch finds no GPU", "give --gpus 0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_generate_prints_the_same_text_on_a_gpu(project):
    arguments = ("generate", "--prompt", "the quick", "--temperature", "0", "--max-tokens", "8")
    assert mhmoe(project[0], *arguments, "--gpus", "1").out == mhmoe(project[0], *arguments).out
