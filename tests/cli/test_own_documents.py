"""Tests that a newcomer's few documents go through all commands of the README at the first try."""

import pyarrow as pa
import pyarrow.parquet
import pytest

from mhmoe_ray.cluster.spawn import free_ports
from tests.cli.run import mhmoe
from tests.data.sources.tables import write_dataset
from tests.data.texts import make_documents, write_documents

TEXTS = make_documents("own", 20, words=300)
SPEC = """
name: own
model:
  vocab_size: 400
  d_model: 64
  layers: 2
  attention_heads: 2
  d_ff: 128
  moe: {heads: 2, experts: 4, top_k: 2, d_expert: 64}
data:
  sources:
    own: {path: PATH}
  prepared: prepared
  seq_len: 64
train: {steps: 20, micro_batches: 2, micro_batch_size: 4, lr: 3.0e-3}
cluster: {workers: 2, ep: 2}
"""


def write_texts(folder):
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02}.txt").write_text(text)
    return folder / "*.txt"


def write_jsonl(folder):
    write_documents(folder / "own.jsonl", TEXTS)
    return folder / "own.jsonl"


def write_parquet(folder):
    folder.mkdir()
    pyarrow.parquet.write_table(pa.table({"text": TEXTS}), folder / "own.parquet")
    return folder / "own.parquet"


def save_data_set(folder):
    write_dataset(folder, TEXTS)
    return folder


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("write", [write_texts, write_jsonl, write_parquet, save_data_set])
def test_few_documents_go_through_all_commands(tmp_path, lane_home, write):
    path = write(tmp_path / "raw").relative_to(tmp_path)
    (tmp_path / "own.yaml").write_text(SPEC.replace("PATH", str(path)))
    port = free_ports(1)[0]
    for words in (
        "data inspect own.yaml",
        "plan own.yaml",
        "submit own.yaml",
        "status",
        "eval",
        "report",
        "ckpt export --to exported",
        "generate --prompt moon --max-tokens 4",
        f"serve deploy --set serve.port={port}",
        "serve down",
    ):
        result = mhmoe(tmp_path, *words.split())
        assert result.code == 0, f"{words}: {result.err}"
