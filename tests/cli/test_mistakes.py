"""Mistakes of newcomers, most of them in the vocabulary of other projects: each gives one line, with a helpful hint or
none."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from mhmoe_ray.errors import DataError, SpecError
from mhmoe_ray.spec import load_resolved_spec
from tests.cli.run import assert_one_line, mhmoe

QUICKSTART = Path("jobs/quickstart.yaml").absolute()
HINT = re.compile(r"did you mean ['`]([^'`]+)['`]")


class Key(NamedTuple):
    """An override of the quickstart, and what its error says.

    `meant` is the hint; it is None where there must be none.
    """

    override: str
    meant: str | None
    says: str = "unknown key"


KEYS = [
    Key("train.learning_rate=1e-3", "lr"),
    Key("train.scheduler=cosine", None, "there is one schedule"),
    Key("train.lr_scheduler_type=cosine", None, "there is one schedule"),
    Key("train.num_train_epochs=3", None, "training is counted in train.steps"),
    Key("train.max_steps=100", "steps"),
    Key("train.batch_size=8", "micro_batch_size"),
    Key("train.per_device_train_batch_size=8", "micro_batch_size"),
    Key("train.gradient_accumulation_steps=4", "micro_batches"),
    Key("train.max_grad_norm=1", "clip_norm"),
    Key("train.bf16=true", "precision"),
    Key("train.gradient_checkpointing=true", "recompute"),
    Key("train.save_steps=10", "checkpoint_every"),
    Key("train.eval_steps=10", "validate_every"),
    Key("train.optimizer=adamw", None, "there is one optimizer"),
    Key("train.step=5", "steps"),
    Key("train.foo=5", None, "known keys here: steps"),
    Key("model.hidden_size=512", "d_model"),
    Key("model.num_hidden_layers=4", "layers"),
    Key("model.n_head=4", "attention_heads"),
    Key("model.num_key_value_heads=2", "kv_heads"),
    Key("model.intermediate_size=512", "d_ff"),
    Key("model.vocabulary_size=512", "vocab_size"),
    Key("model.moe.num_experts=8", "experts"),
    Key("model.moe.num_local_experts=8", "experts"),
    Key("model.moe.num_experts_per_tok=2", "top_k"),
    Key("model.moe.topk=2", "top_k"),
    Key("model.moe.router_aux_loss_coef=0.01", "balance_weight"),
    Key("model.moe.frobnicate=1", None, "known keys here: heads"),
    Key("data.dataset=c4", "sources"),
    Key("data.max_seq_length=128", "seq_len"),
    Key("data.block_size=128", "seq_len"),
    Key("data.sample_packing=true", "packing"),
    Key("cluster.num_workers=4", "workers"),
    Key("cluster.gpus=1", "gpus_per_worker"),
    Key("cluster.expert_parallel_degree=2", "ep"),
    Key("cluster.tensor_parallel_degree=2", None, "data and expert parallelism"),
    Key("output_dir=out", "storage"),
    Key("learning_rate=1e-3", "train.lr"),
    Key("hidden_size=512", "model.d_model"),
    Key("serve.max_num_seqs=8", "max_concurrency"),
    Key("resume_from_checkpoint=true", None, "mhmoe resume RUN"),
    Key("train.steps=many", None, "'train.steps': Input should be a valid integer"),
    Key("train.steps=-1", None, "'train.steps': Input should be greater than 0"),
    Key("model.backbone=mistral", None, "'model.backbone': Input should be 'llama' or 'subln'"),
    Key("cluster.workers=3", None, "must be a multiple of"),
    Key("train.steps", None, "it is not key=value"),
]


class Command(NamedTuple):
    arguments: str
    code: int
    meant: str | None
    says: str


COMMANDS = [
    Command("train spec.yaml", 2, "mhmoe submit", "there is no command 'train'"),
    Command("export run", 2, "mhmoe ckpt export", "there is no command 'export'"),
    Command("ls", 2, "mhmoe list", "there is no command 'ls'"),
    Command("kill run", 2, "mhmoe stop", "there is no command 'kill'"),
    Command("chat run", 2, "mhmoe generate", "there is no command 'chat'"),
    Command("sumbit spec.yaml", 2, "mhmoe submit", "there is no command 'sumbit'"),
    Command("frobnicate", 2, None, "there are plan, presets, schema, submit"),
    Command("data tokenize spec.yaml", 2, "mhmoe data prepare", "there is no command 'tokenize'"),
    Command("ckpt push run", 2, "mhmoe ckpt export", "there is no command 'push'"),
    Command("submit nowhere.yaml", 3, None, "spec nowhere.yaml: No such file"),
    Command("status nothing", 7, None, "run nothing"),
    Command("generate nothing --prompt hi", 7, None, "nothing"),
    Command("plan spec.yaml --gpus 8", 2, None, "both of them"),
]


def test_there_are_as_many_as_the_rule_asks_for():
    assert len(KEYS) + len(COMMANDS) >= 52


@pytest.mark.parametrize("case", KEYS, ids=[case.override for case in KEYS])
def test_a_key(case):
    with pytest.raises((SpecError, DataError)) as raised:
        load_resolved_spec(QUICKSTART, [case.override])
    text = str(raised.value)
    assert "\n" not in text
    assert case.says in text
    assert (match[1] if (match := HINT.search(text)) else None) == case.meant


@pytest.mark.parametrize("case", COMMANDS, ids=[case.arguments for case in COMMANDS])
def test_a_command(case, tmp_path):
    (tmp_path / "spec.yaml").write_text(QUICKSTART.read_text())
    result = mhmoe(tmp_path, *case.arguments.split())
    assert case.says in " ".join(result.err.split())
    assert (match[1] if (match := HINT.search(result.err)) else None) == case.meant
    if case.code == 2:
        assert result.code == 2
        assert "Traceback" not in result.err
    else:
        assert_one_line(result, case.code, case.says)


def test_a_plan_warns_of_text_and_tokenizers_that_are_not_there(tmp_path):
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
