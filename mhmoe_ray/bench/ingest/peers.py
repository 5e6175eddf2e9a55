"""What users have without us: Hugging Face's datasets to prepare text, MosaicML's streaming to read it in training."""

import os
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mhmoe_ray.bench.ingest.memory import Peak
from mhmoe_ray.data.shards.files import ShardReader
from mhmoe_ray.data.shards.manifest import require_data_manifest
from mhmoe_ray.data.sources import find_files
from mhmoe_ray.data.tokenizer import boundaries, document_encoder
from mhmoe_ray.spec import RunSpec


def prepare_datasets(spec: RunSpec, folder: Path, processes: int) -> dict[str, Any]:
    """`load_dataset("json")`, then `map` with the tokenizers library, then `map` to samples of T + 1 tokens; all
    domains in one, which is less work than to keep them apart.

    Args:
        spec: whose data are prepared: it reads their sources, with their tokenizer.json.
        folder: empty, for what it writes.
        processes: of each `map`, and of loading.
    """
    file = spec.data.prepared / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    start = boundaries(tokenizer).start

    def encode(texts: list[str]) -> list[list[int]]:
        return [[start, *encoding.ids] for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return _prepare_datasets(spec, folder, processes, encode)


def prepare_datasets_with_ours(spec: RunSpec, folder: Path, processes: int) -> dict[str, Any]:
    """The same with our encoder of documents."""
    file = spec.data.prepared / "tokenizer.json"
    return _prepare_datasets(spec, folder, processes, lambda texts: document_encoder(file).encode(texts))


def _prepare_datasets(
    spec: RunSpec, folder: Path, processes: int, encode: Callable[[list[str]], list[list[int]]]
) -> dict[str, Any]:
    os.environ |= {"HF_HOME": str(folder), "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import datasets

    datasets.disable_progress_bars()
    length = spec.data.seq_len

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        return {"ids": encode(batch["text"])}

    def pack(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        ids = list(chain.from_iterable(batch["ids"]))
        return {"ids": [ids[i : i + length + 1] for i in range(0, len(ids) - length, length)]}

    files = [file.path for file in find_files(spec.data)]
    options: dict[str, Any] = {"split": "train", "cache_dir": str(folder)}
    # Records differ from file to file in what `meta` holds, which only loads as text. Not timed.
    heads = [datasets.load_dataset("json", data_files=[file], streaming=True, **options).features for file in files]
    options["features"] = datasets.Features({name: datasets.Value("string") for head in heads for name in head})
    with Peak() as peak:
        began = time.perf_counter()
        loaded = datasets.load_dataset("json", data_files=files, num_proc=min(processes, len(files)), **options)
        texts = loaded.select_columns("text")
        tokenised = texts.map(tokenise, batched=True, num_proc=processes, remove_columns="text")
        packed = tokenised.map(pack, batched=True, num_proc=processes)
        seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "tokens": len(packed) * length,
        "peak_bytes": peak.resident,
        "own_bytes": peak.own,
    }


def stream_mosaicml(spec: RunSpec, folder: Path, processes: int) -> dict[str, Any]:
    """The same samples from MDS shards, shuffled, through torch's DataLoader. Writing the shards is not timed.

    Args:
        spec: of a training whose data are prepared.
        folder: empty, for what it writes.
        processes: of the loader.
    """
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    b, wanted = spec.train.micro_batch_size, spec.train.steps * spec.train.micro_batches
    manifest = require_data_manifest(spec.data.prepared)
    columns = {"tokens": f"ndarray:uint{8 * manifest.token_bytes}:{spec.data.seq_len + 1}"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for domain in manifest.domains.values():
            reader = ShardReader(spec.data.prepared, domain.shards, manifest.token_bytes)
            for start in range(0, len(reader), 1024):
                for sample in reader.read(np.arange(start, min(start + 1024, len(reader)))):
                    writer.write({"tokens": sample})
    dataset = StreamingDataset(local=str(folder), batch_size=b, shuffle=True, shuffle_seed=spec.seed)
    loader = DataLoader(dataset, batch_size=b, num_workers=processes, drop_last=True)
    number, began = 0, 0.0
    while number < wanted:
        before = number
        for _ in loader:
            if number == 0:
                began = time.perf_counter()
            number += 1
            if number == wanted:
                break
        if number == before:
            raise ValueError(f"the samples do not fill a micro-batch of {b} in any of {processes} processes")
    return {"seconds": time.perf_counter() - began, "micro_batches": wanted - 1}
