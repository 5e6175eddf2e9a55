"""Tests of the errors that newcomers get, most of them for the keys and commands of other projects.

Each mistake gives one line, with a hint only if there is a helpful one.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from mhmoe_ray.errors import DataError, SpecError
from mhmoe_ray.spec import load_resolved_spec
from tests.cli.run import assert_one_line, mhmoe

QUICKSTART = Path("jobs/quickstart.yaml").absolute()
HINT = re.compile(r"did you mean ['`]([^'`]+)['`]")


class KeyMistake(NamedTuple):
    """A wrong override of the quickstart's spec, and its expected error.

    `hint` is the key that the error suggests; None if it must suggest none.
    """

    override: str
    hint: str | None
    message: str = "unknown key"


KEYS = [
    KeyMistake("train.learning_rate=1e-3", "lr"),
    KeyMistake("train.scheduler=cosine", "schedule"),
    KeyMistake("train.lr_scheduler_type=cosine", "schedule"),
    KeyMistake("train.num_train_epochs=3", None, "training is counted in train.steps"),
    KeyMistake("train.max_steps=100", "steps"),
    KeyMistake("train.batch_size=8", "micro_batch_size"),
    KeyMistake("train.per_device_train_batch_size=8", "micro_batch_size"),
    KeyMistake("train.gradient_accumulation_steps=4", "micro_batches"),
    KeyMistake("train.max_grad_norm=1", "clip_norm"),
    KeyMistake("train.bf16=true", "precision"),
    KeyMistake("train.gradient_checkpointing=true", "recompute"),
    KeyMistake("train.save_steps=10", "checkpoint_every"),
    KeyMistake("train.eval_steps=10", "validate_every"),
    KeyMistake("train.optimizer=adamw", None, "there is one optimizer"),
    KeyMistake("train.step=5", "steps"),
    KeyMistake("train.foo=5", None, "known keys here: steps"),
    KeyMistake("model.hidden_size=512", "d_model"),
    KeyMistake("model.num_hidden_layers=4", "layers"),
    KeyMistake("model.n_head=4", "attention_heads"),
    KeyMistake("model.num_key_value_heads=2", "kv_heads"),
    KeyMistake("model.intermediate_size=512", "d_ff"),
    KeyMistake("model.vocabulary_size=512", "vocab_size"),
    KeyMistake("model.moe.num_experts=8", "experts"),
    KeyMistake("model.moe.num_local_experts=8", "experts"),
    KeyMistake("model.moe.num_experts_per_tok=2", "top_k"),
    KeyMistake("model.moe.topk=2", "top_k"),
    KeyMistake("model.moe.router_aux_loss_coef=0.01", "balance_weight"),
    KeyMistake("model.moe.frobnicate=1", None, "known keys here: heads"),
    KeyMistake("data.dataset=c4", "sources"),
    KeyMistake("data.max_seq_length=128", "seq_len"),
    KeyMistake("data.block_size=128", "seq_len"),
    KeyMistake("data.sample_packing=true", "packing"),
    KeyMistake("cluster.num_workers=4", "workers"),
    KeyMistake("cluster.gpus=1", "gpus_per_worker"),
    KeyMistake("cluster.expert_parallel_degree=2", "ep"),
    KeyMistake("cluster.tensor_parallel_degree=2", None, "data and expert parallelism"),
    KeyMistake("output_dir=out", "storage"),
    KeyMistake("learning_rate=1e-3", "train.lr"),
    KeyMistake("hidden_size=512", "model.d_model"),
    KeyMistake("serve.max_num_seqs=8", "max_concurrency"),
    KeyMistake("resume_from_checkpoint=true", None, "mhmoe resume RUN"),
    KeyMistake("train.steps=many", None, "'train.steps': Input should be a valid integer"),
    KeyMistake("train.steps=-1", None, "'train.steps': Input should be greater than 0"),
    KeyMistake("model.backbone=mistral", None, "'model.backbone': Input should be 'llama' or 'subln'"),
    KeyMistake("cluster.workers=3", None, "must be a multiple of"),
    KeyMistake("train.steps", None, "it is not key=value"),
]


class CommandMistake(NamedTuple):
    """A wrong command line, and its expected exit code and error.

    `hint` is the command that the error suggests; None if it must suggest none.
    """

    arguments: str
    code: int
    hint: str | None
    message: str


COMMANDS = [
    CommandMistake("train spec.yaml", 2, "mhmoe submit", "there is no command 'train'"),
    CommandMistake("export run", 2, "mhmoe ckpt export", "there is no command 'export'"),
    CommandMistake("ls", 2, "mhmoe list", "there is no command 'ls'"),
    CommandMistake("kill run", 2, "mhmoe stop", "there is no command 'kill'"),
    CommandMistake("chat run", 2, "mhmoe generate", "there is no command 'chat'"),
    CommandMistake("sumbit spec.yaml", 2, "mhmoe submit", "there is no command 'sumbit'"),
    CommandMistake("frobnicate", 2, None, "there are plan, presets, schema, submit"),
    CommandMistake("data tokenize spec.yaml", 2, "mhmoe data prepare", "there is no command 'tokenize'"),
    CommandMistake("ckpt push run", 2, "mhmoe ckpt export", "there is no command 'push'"),
    CommandMistake("submit nowhere.yaml", 3, None, "spec nowhere.yaml: No such file"),
    CommandMistake("status nothing", 7, None, "run nothing"),
    CommandMistake("generate nothing --prompt hi", 7, None, "nothing"),
    CommandMistake("plan spec.yaml --train.lr=1e-3", 2, None, "write --set train.lr=1e-3"),
    CommandMistake("plan spec.yaml train.lr=1e-3", 2, None, "write --set train.lr=1e-3"),
    CommandMistake("plan spec.yaml --set train.lr 1e-3", 2, None, "write --set train.lr=1e-3"),
    CommandMistake("sweep spec.yaml", 3, None, "give it to `mhmoe submit`"),
    CommandMistake("status run@5", 7, None, "leave out @STEP"),
    CommandMistake("ckpt inspect run@5", 7, None, "there is no such run"),
    CommandMistake("plan spec.yaml --gpus 8", 2, None, "needs both --nodes and --gpus"),
]


def test_number_of_mistakes_is_at_least_52():
    assert len(KEYS) + len(COMMANDS) >= 52


@pytest.mark.parametrize("case", KEYS, ids=[case.override for case in KEYS])
def test_wrong_key_has_a_message_and_a_hint(case):
    with pytest.raises((SpecError, DataError)) as raised:
        load_resolved_spec(QUICKSTART, [case.override])
    text = str(raised.value)
    assert "\n" not in text
    assert case.message in text
    assert (match[1] if (match := HINT.search(text)) else None) == case.hint


@pytest.mark.parametrize("case", COMMANDS, ids=[case.arguments for case in COMMANDS])
def test_wrong_command_has_a_message_and_a_hint(case, tmp_path):
    (tmp_path / "spec.yaml").write_text(QUICKSTART.read_text())
    result = mhmoe(tmp_path, *case.arguments.split())
    assert case.message in " ".join(result.err.split())
    assert (match[1] if (match := HINT.search(result.err)) else None) == case.hint
    if case.code == 2:
        assert result.code == 2
        assert "Traceback" not in result.err
    else:
        assert_one_line(result, case.code, case.message)


@pytest.mark.parametrize("words", [("serve", "deploy"), ("ckpt", "import"), ("ckpt", "verify", "other"), ("status",)])
def test_folder_that_cannot_be_read_is_one_line(tmp_path, words):
    # A name that is too long gives an error even to the root user, who may read the folders of all users.
    assert_one_line(mhmoe(tmp_path, *words[:2], "a" * 300, *words[2:]), 7, "storage aaa", "File name too long")


def test_plan_warns_of_missing_text_and_tokenizers(tmp_path):
    (tmp_path / "spec.yaml").write_text(QUICKSTART.read_text())
    changes = ["--set", "data.tokenizer=nowhere.json", "--set", "data.tokenizer_train_mb=null"]
    result = mhmoe(tmp_path, "plan", "spec.yaml", *changes)
    assert result.code == 0, result.err
    warnings = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert any("source redpajama" in line for line in warnings)
    assert any("nowhere.json" in line for line in warnings)
    assert mhmoe(tmp_path, "plan", "spec.yaml", "--json", *changes).json()["warnings"] == [
        line.removeprefix("warning: ") for line in warnings
    ]
