"""Preparation and streaming of text, up to shards and micro-batches, by several packages in interleaved rounds.

Our own preparation and stream are compared with Hugging Face's datasets for preparing text, and with MosaicML's
streaming for reading it in training, if they are installed. Each measurement has a process and a folder of its own.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.data
from tokenizers import Tokenizer

from mhmoe_ray.bench.process_memory import Peak
from mhmoe_ray.bench.processes import Measurement, run_apart
from mhmoe_ray.bench.timing import turns
from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.data.shards.files import ShardReader
from mhmoe_ray.data.shards.manifest import require_data_manifest
from mhmoe_ray.data.sources import find_files
from mhmoe_ray.data.stream import training_stream
from mhmoe_ray.data.tokenizer import boundaries, document_encoder
from mhmoe_ray.spec import RunSpec


def prepare_ours(spec: RunSpec, folder: Path, processes: int) -> dict[str, Any]:
    """Run the whole of `mhmoe data prepare`, quarantine, held-out documents and baselines included, and measure it.

    Args:
        spec: a spec with a given tokenizer, whose sources are read.
        folder: an empty folder for the output.
        processes: the number of processes that tokenize at a time.
    """
    data = spec.data.model_copy(update={"prepared": folder / "prepared"})
    ray.init("local", num_cpus=processes, log_to_driver=False, include_dashboard=False)
    with Peak() as peak:
        began = time.perf_counter()
        manifest = prepare(spec.model_copy(update={"data": data}))
        seconds = time.perf_counter() - began
    domains = manifest.domains.values()
    return {
        "seconds": seconds,
        "tokens": sum(d.tokens + d.validation_tokens for d in domains),
        "text_bytes": sum(d.text_bytes for d in domains),
        "peak_bytes": peak.resident,
        "own_bytes": peak.own,
    }


def stream_ours(spec: RunSpec, folder: Path, processes: int) -> dict[str, Any]:
    """Read every micro-batch of a training by one rank, check their order, and measure all but the first.

    Args:
        spec: the spec of a training whose data are prepared.
        folder: an argument that is not used.
        processes: the number of logical CPUs of Ray.
    """
    ray.init("local", num_cpus=processes, log_to_driver=False, include_dashboard=False)
    stream = training_stream(spec, 0, 1)
    stream.context.execution_options = ray.data.ExecutionOptions(preserve_order=True)
    [split] = stream.streaming_split(1, equal=True)
    b, wanted, began = spec.train.micro_batch_size, spec.train.steps * spec.train.micro_batches, 0.0
    for number, batch in enumerate(split.iter_batches(batch_size=b, batch_format="numpy", prefetch_batches=4)):
        assert np.array_equal(batch["position"], number * b + np.arange(b)), "the order"
        if number == 0:
            began = time.perf_counter()
        if number == wanted - 1:
            break
    return {"seconds": time.perf_counter() - began, "micro_batches": wanted - 1}


def prepare_datasets(spec: RunSpec, folder: Path, processes: int) -> dict[str, Any]:
    """Prepare text with Hugging Face's datasets and tokenizers, and measure it.

    It runs `load_dataset("json")`, then `map` with the tokenizers library, then `map` to samples of T + 1 tokens. All
    domains are put together, which is less work than to keep them apart.

    Args:
        spec: a spec whose data are prepared; their sources and their tokenizer.json are read.
        folder: an empty folder for the output.
        processes: the number of processes of each `map`, and the most for loading.
    """
    file = spec.data.prepared / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    start = boundaries(tokenizer).start

    def encode(texts: list[str]) -> list[list[int]]:
        return [[start, *encoding.ids] for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return _prepare_datasets(spec, folder, processes, encode)


def prepare_datasets_with_ours(spec: RunSpec, folder: Path, processes: int) -> dict[str, Any]:
    """Prepare text as `prepare_datasets` does, but with our encoder of documents."""
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
    """Read the same samples from MDS shards, shuffled, through torch's DataLoader, and measure it.

    Writing the shards is not timed, nor is the first micro-batch.

    Args:
        spec: the spec of a training whose data are prepared.
        folder: an empty folder for the shards.
        processes: the number of worker processes of the DataLoader.
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


class Contestant(NamedTuple):
    task: str
    package: str
    """Name of the package that must be installed."""
    run: Measurement


CONTESTANTS = {
    "prepare: mhmoe": Contestant("prepare", "ray", prepare_ours),
    "prepare: datasets": Contestant("prepare", "datasets", prepare_datasets),
    "prepare: datasets, our encoder": Contestant("prepare", "datasets", prepare_datasets_with_ours),
    "stream: mhmoe": Contestant("stream", "ray", stream_ours),
    "stream: mosaicml-streaming": Contestant("stream", "streaming", stream_mosaicml),
}
OURS = ("prepare: mhmoe", "stream: mhmoe")


class Figures(NamedTuple):
    name: str
    rounds: list[dict[str, Any]]
    """Measurements of each round, `seconds` among them."""
    to_ours: float
    """Median over rounds of the ratio of its time to ours."""

    def median(self, key: str) -> float:
        return float(statistics.median(found[key] for found in self.rounds))


def contest(
    spec: RunSpec, names: list[str], rounds: int, processes: int, tell: Callable[[str], None]
) -> Iterator[Figures]:
    """Measure the named contestants in interleaved rounds, and yield the figures of each.

    Args:
        spec: a spec with a given tokenizer; for contestants that stream, one whose data are prepared.
        names: keys of `CONTESTANTS`, ours among them.
        rounds: the number of rounds of all contestants; every other round is in reverse order.
        processes: the number of processes of each contestant.
        tell: a function that is called with a line after each measurement.

    Raises:
        JobError: one of the contestants failed.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn, name in turns(names, rounds):
        result = run_apart(CONTESTANTS[name].run, spec, processes, f"bench ingest, {name}")
        tell(f"round {turn + 1}: {name} took {result['seconds']:.1f} s")
        found[name].append(result)
    for name, results in found.items():
        own = found[next(n for n in OURS if CONTESTANTS[n].task == CONTESTANTS[name].task)]
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(results, own, strict=True)]
        yield Figures(name, results, statistics.median(ratios))
