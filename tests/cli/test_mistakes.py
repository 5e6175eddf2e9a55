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
    KeyMistake("model.backbone=mistral", None, "'model.backbone': Input should be 'llama', 'subln' or 'vit'"),
    KeyMistake("cluster.workers=3", None, "must be a multiple of"),
    KeyMistake("train.steps", None, "it is not key=value"),
    KeyMistake("train.warmup_ratio=0.1", "warmup_steps"),
    KeyMistake("train.adam_beta1=0.9", "betas"),
    KeyMistake("train.betas=0.9", None, "'train.betas': Input should be a valid tuple"),
    KeyMistake("train.precision=bf16", None, "'train.precision': Input should be 'float32' or 'bfloat16'"),
    KeyMistake("train.seed=42", "seed"),
    KeyMistake("train.logging_steps=10", None, "metrics.jsonl has a line for every step"),
    KeyMistake("train.micro_batch=8", "micro_batch_size"),
    KeyMistake("train.accumulate=4", "micro_batches"),
    KeyMistake("train.lr=0", None, "'train.lr': Input should be greater than 0"),
    KeyMistake("train.lr=fast", None, "'train.lr': Input should be a valid number"),
    KeyMistake("train.epochs=1", None, "training is counted in train.steps"),
    KeyMistake("train.save_total_limit=3", "keep_checkpoints"),
    KeyMistake("train.checkpoint_every=0", None, "'train.checkpoint_every': Input should be greater than 0"),
    KeyMistake("model.head_dim=64", "d_head"),
    KeyMistake("model.max_position_embeddings=512", "data.seq_len"),
    KeyMistake("model.attention_heads=7", None, "d_model 128 must be a multiple of twice attention_heads (7)"),
    KeyMistake("model.layers=0", None, "'model.layers': Input should be greater than 0"),
    KeyMistake("model.moe.num_heads=2", "heads"),
    KeyMistake("model.moe.capacity=1.25", "capacity_factor"),
    KeyMistake("model.moe.top_k=9", None, "top_k is 9, but there are only 8 experts"),
    KeyMistake("model.moe.heads=3", None, "d_model 128 does not split into 3 equal sub-tokens"),
    KeyMistake("model.moe.router=sinkhorn", None, "'model.moe.router': Input should be 'linear'"),
    KeyMistake("data.path=raw", "sources"),
    KeyMistake("data.val_split=0.1", "validation_fraction"),
    KeyMistake("data.sources.redpajama.format=csv", None, "Input should be 'jsonl'"),
    KeyMistake("data.prepared=ftp://bucket/data", None, "ftp:// is not known; use a local path, s3:// or gs://"),
    KeyMistake("cluster.cpus=4", "cpus_per_worker"),
    KeyMistake("cluster.ep=3", None, "workers (2) must be a multiple of ep (3)"),
    KeyMistake("cluster.strategy=deepspeed", None, "'cluster.strategy': Input should be 'ddp'"),
    KeyMistake("cluster.gpus_per_worker=0.5", None, "Input should be a valid integer"),
    KeyMistake("serve.api_key=abc", "keys"),
    KeyMistake("serve.port=99999", None, "Input should be less than or equal to 65535"),
    KeyMistake("serve.engine=sglang", None, "'serve.engine': Input should be 'torch' or 'vllm'"),
    KeyMistake("wandb.project=x", None, "known keys here: name"),
    KeyMistake("name=my run", None, "only lower-case letters, digits and dashes"),
    KeyMistake("train.lr=1e-3,train.steps=5", None, "'train.lr': Input should be a valid number"),
    KeyMistake("train.precision=fp8", None, "leave this key out"),
    KeyMistake("data.sources=docs", None, "'data.sources': Input should be a valid dictionary"),
    KeyMistake("data.validation_fraction=10", None, "Input should be less than 0.5 (got 10)"),
    KeyMistake("data.sources.redpajama.weight=-1", None, "Input should be greater than or equal to 0 (got -1)"),
    KeyMistake("cluster.backend=nccl", None, "known keys here: workers"),
    KeyMistake("model.dropout=1.5", None, "'model.dropout': Input should be less than 1"),
    KeyMistake("model.tie_word_embeddings=true", "tied_embeddings"),
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
    CommandMistake("talk run", 2, "mhmoe chat", "there is no command 'talk'"),
    CommandMistake("sumbit spec.yaml", 2, "mhmoe submit", "there is no command 'sumbit'"),
    CommandMistake("frobnicate", 2, None, "there are init, plan, presets, schema, submit"),
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
    CommandMistake("eval spec.yaml", 7, None, "it is a file, and a run is named by its id"),
    CommandMistake("plan spec.yaml --set preset=llama", 3, None, "there is no such preset"),
    CommandMistake("submit spec.yaml --set data.sources.redpajama.path=raw", 4, None, "there is no file or folder"),
    CommandMistake("data inspect nowhere", 4, None, "source nowhere: there is no file or folder"),
    CommandMistake("data sample spec.yaml", 4, None, "Not a directory"),
    CommandMistake("status", 7, None, "it holds no run yet"),
    CommandMistake("serve deploy nowhere", 7, None, "there is no such run"),
    CommandMistake("cluster use nowhere", 5, None, "there is no cluster of this name"),
    CommandMistake("ckpt import no/model --name x", 8, None, "name a folder, a run, or hf:ORGANIZATION/NAME"),
    CommandMistake("generate --prompt hi --top-p 2", 2, None, "Input should be less than or equal to 1"),
    CommandMistake("submit tab.yaml", 3, None, "line 2: found character '\\t'"),
    CommandMistake("submit list.yaml", 3, None, "it is not a mapping; write one: mhmoe init"),
    CommandMistake("submit twice.yaml", 3, None, "line 2: the key 'preset' is given twice"),
    CommandMistake("submit folder", 3, None, "give the path of a YAML spec"),
    CommandMistake("submit", 2, None, "Missing argument 'spec'"),
    CommandMistake("init folder --name x", 2, None, "No such option: --name"),
    CommandMistake("init --output spec.yaml", 3, None, "it exists already"),
    CommandMistake("plan spec.yaml --set preset=mhmoe-tiny", 3, None, "`mhmoe presets` lists them all"),
    CommandMistake("sweep sweep.yaml --only nothing", 3, None, "choose from dense"),
    CommandMistake("sweep sweep.yaml --size huge", 3, None, "choose from small"),
    CommandMistake("sweep sweep.yaml --seeds a", 3, None, "'seeds.0': Input should be a valid integer"),
    CommandMistake("ckpt export run", 2, None, "Missing option '--to'"),
    CommandMistake("logs run --follow-x", 2, None, "Possible options: --follow"),
    CommandMistake("generate --prompt hi --max-tokens 0", 2, None, "Input should be greater than or equal to 1"),
    CommandMistake("generate --prompt hi --temperature -1", 2, None, "Input should be greater than or equal to 0"),
    CommandMistake("schema spec.yaml", 2, None, "is not one of 'spec', 'sweep'"),
    CommandMistake("serve deploy --name a/b", 10, None, "the name is part of a URL"),
    CommandMistake("cluster use http://localhost:1", 5, None, "give the address of its dashboard"),
]


FILES = {
    "spec.yaml": QUICKSTART.read_text(),
    "sweep.yaml": "name: x\nsizes: {small: {spec: spec.yaml}}\nruns: {dense: {preset: dense}}\n",
    "tab.yaml": "name: x\n\tpreset: mhmoe\n",
    "list.yaml": "- name\n",
    "twice.yaml": "preset: mhmoe\npreset: dense\n",
}


def test_number_of_mistakes_is_at_least_130():
    assert len(KEYS) + len(COMMANDS) >= 130


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
    (tmp_path / "folder").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
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
