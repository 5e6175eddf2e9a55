"""Test of batch inference with vLLM as its engine, by a job on a cluster."""

import pytest

from mhmoe_ray.runs.directory import RunDir, mark_imported
from tests.cli.run import mhmoe_subprocess
from tests.serving.batch.conftest import read_output, write_input
from tests.serving.conftest import build_model, build_tokenizer, save_checkpoint
from tests.serving.prompts import greedy_tokens

from .conftest import SPEC

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_job_answers_with_the_models_tokens(tmp_path, local_cluster, tokenizer):
    run = RunDir(tmp_path / "tiny-abc123")
    run.path.mkdir()
    build_tokenizer().save(str(run.tokenizer_file))
    model = build_model(SPEC)
    save_checkpoint(run.path, 1, model)
    mark_imported(run)
    prompts = [f"the quick {i}" for i in range(20)]
    path = write_input(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in prompts])
    words = ["generate", str(run.path), "--input", str(path), "--output", str(tmp_path / "out"), "--engine", "vllm"]
    words += ["--max-tokens", "20", "--temperature", "0", "--logprobs", "1", "--chunk-rows", "8"]
    result = mhmoe_subprocess(tmp_path, *words)
    assert result.code == 0, result.err
    for prompt, row in zip(prompts, read_output(tmp_path / "out"), strict=True):
        ids = [0, *tokenizer.encode(prompt, add_special_tokens=False).ids]
        assert row["text"] == tokenizer.decode(greedy_tokens(model, ids, 20, end_tokens={0}))
        assert len(row["logprobs"]) == row["tokens"]
    assert "for another request: engine vllm, not torch" in mhmoe_subprocess(tmp_path, *words, "--engine", "torch").err
