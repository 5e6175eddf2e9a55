"""Preparation of text as shards, and streaming of micro-batches, by several packages in interleaved rounds.

Our preparation is compared with Hugging Face's datasets, our stream with MosaicML's streaming, and the stream of a
model with images with a bare pool of processes that decode and crop the same images. Each measurement runs in a process
and an empty folder of its own.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.data
from tokenizers import Tokenizer

from mhmoe_ray.bench.process_memory import PeakMemory
from mhmoe_ray.bench.processes import Measurement, run_in_process
from mhmoe_ray.bench.timing import turns
from mhmoe_ray.data.family import data_of
from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.data.samples import TrainingSamples
from mhmoe_ray.data.shards.files import ShardReader
from mhmoe_ray.data.shards.manifest import TOKENIZER_FILE, require_data_manifest
from mhmoe_ray.data.sources import find_files
from mhmoe_ray.data.stream import training_stream
from mhmoe_ray.data.tokenizer import boundaries, document_encoder
from mhmoe_ray.spec import RunSpec


def prepare_with_mhmoe(spec: RunSpec, folder: Path, processes: int) -> dict[str, Any]:
    """Prepare text as `mhmoe data prepare` does, with quarantine, held-out documents and the baselines of the loss."""
    data = spec.data.model_copy(update={"prepared": folder / "prepared"})
    ray.init("local", num_cpus=processes, log_to_driver=False, include_dashboard=False)
    with PeakMemory() as peak:
        start_time = time.perf_counter()
        manifest = prepare(spec.model_copy(update={"data": data}))
        seconds = time.perf_counter() - start_time
    domains = manifest.domains.values()
    return {
        "seconds": seconds,
        "tokens": sum(d.tokens + d.validation_tokens for d in domains),
        "text_bytes": sum(d.text_bytes for d in domains),
        "peak_bytes": peak.resident,
        "own_bytes": peak.private,
    }


def stream_with_mhmoe(spec: RunSpec, folder: Path, processes: int) -> dict[str, Any]:
    """Stream all micro-batches of a training to one rank, check their order, and measure the time of all but the first.

    `processes` is the number of Ray's logical CPUs.
    """
    ray.init("local", num_cpus=processes, log_to_driver=False, include_dashboard=False)
    stream = training_stream(spec, 0, 1)
    # The stream is measured in order because training reads it in order. The assertion below needs the order too.
    stream.context.execution_options = ray.data.ExecutionOptions(preserve_order=True)
    [split] = stream.streaming_split(1, equal=True)
    b, batch_count = spec.train.micro_batch_size, spec.train.steps * spec.train.micro_batches
    start_time, end_time = 0.0, 0.0
    # A row of an image stream is a whole micro-batch, and a row of a decoder's stream is one sample.
    rows = 1 if data_of(spec.model).has_rows else b
    for number, batch in enumerate(split.iter_batches(batch_size=rows, batch_format="numpy", prefetch_batches=4)):
        assert np.array_equal(batch["position"], number * b + np.arange(rows)), "the order"
        # The clock starts after the first micro-batch, because the wait for it includes the start of the stream, which
        # is not measured. By then some of the next micro-batches are made already, which distorts the rate unless there
        # are about a thousand micro-batches.
        if number == 0:
            start_time = time.perf_counter()
        if number == batch_count - 1:
            # The clock is read before the stream ends its tasks, because their end is not measured.
            end_time = time.perf_counter()
            break
    return {"seconds": end_time - start_time, "micro_batches": batch_count - 1}


def stream_with_pool(spec: RunSpec, folder: Path, processes: int) -> dict[str, Any]:
    """Make all micro-batches of a training with images in a pool of processes, and measure all but the first."""
    batch_count, start_time = spec.train.steps * spec.train.micro_batches, 0.0
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for number, _ in enumerate(pool.imap(partial(_read_micro_batch, spec), range(batch_count), POOL_CHUNK)):
            if number == 0:
                start_time = time.perf_counter()
        seconds = time.perf_counter() - start_time
    return {"seconds": seconds, "micro_batches": batch_count - 1}


def _read_micro_batch(spec: RunSpec, number: int) -> Any:
    return TrainingSamples.open_cached(spec).read_micro_batch(number)


def prepare_with_datasets(spec: RunSpec, folder: Path, processes: int) -> dict[str, Any]:
    """Prepare text with Hugging Face's datasets and tokenizers.

    It runs `load_dataset("json")`, then `map` with the tokenizers library, then `map` to samples of T + 1 tokens. All
    domains are concatenated, which is less work than separate domains. The tokenizer is that of the prepared data.
    """
    file = spec.data.prepared / TOKENIZER_FILE
    tokenizer = Tokenizer.from_file(str(file))
    start_id = boundaries(tokenizer).start

    def encode(texts: list[str]) -> list[list[int]]:
        return [[start_id, *encoding.ids] for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return _prepare_with_encoder(spec, folder, processes, encode)


def prepare_with_our_encoder(spec: RunSpec, folder: Path, processes: int) -> dict[str, Any]:
    """Prepare text with Hugging Face's datasets, but tokenize it with our document encoder."""
    file = spec.data.prepared / TOKENIZER_FILE
    return _prepare_with_encoder(spec, folder, processes, lambda texts: document_encoder(file).encode(texts))


def _prepare_with_encoder(
    spec: RunSpec, folder: Path, processes: int, encode: Callable[[list[str]], list[list[int]]]
) -> dict[str, Any]:
    os.environ |= {"HF_HOME": str(folder), "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # datasets reads the environment variables, such as HF_HOME, when it is imported, so they are set before.
    import datasets

    datasets.disable_progress_bars()
    length = spec.data.seq_len

    def tokenize_batch(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        return {"ids": encode(batch["text"])}

    def pack_batch(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        # Samples overlap by one token, because the last target of a sample is also the first input of the next sample.
        ids = list(chain.from_iterable(batch["ids"]))
        return {"ids": [ids[i : i + length + 1] for i in range(0, len(ids) - length, length)]}

    files = [file.path for file in find_files(spec.data)]
    options: dict[str, Any] = {"split": "train", "cache_dir": str(folder)}
    # The column `meta` has different fields in different files, so the files have no common type for it. All columns
    # are therefore loaded as text. Finding the names of the columns is not timed.
    features_by_file = [
        datasets.load_dataset("json", data_files=[file], streaming=True, **options).features for file in files
    ]
    options["features"] = datasets.Features(
        {name: datasets.Value("string") for file_features in features_by_file for name in file_features}
    )
    with PeakMemory() as peak:
        start_time = time.perf_counter()
        dataset = datasets.load_dataset("json", data_files=files, num_proc=min(processes, len(files)), **options)
        texts = dataset.select_columns("text")
        tokenized_dataset = texts.map(tokenize_batch, batched=True, num_proc=processes, remove_columns="text")
        packed_dataset = tokenized_dataset.map(pack_batch, batched=True, num_proc=processes)
        seconds = time.perf_counter() - start_time
    return {
        "seconds": seconds,
        "tokens": len(packed_dataset) * length,
        "peak_bytes": peak.resident,
        "own_bytes": peak.private,
    }


def stream_with_mosaicml(spec: RunSpec, folder: Path, processes: int) -> dict[str, Any]:
    """Read the training samples in random order with MosaicML's streaming and torch's DataLoader.

    The seconds include neither the writing of the samples as MDS shards nor the first micro-batch.
    """
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    b, batch_count = spec.train.micro_batch_size, spec.train.steps * spec.train.micro_batches
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
    number, start_time, end_time = 0, 0.0, 0.0
    # One pass over the samples may give fewer micro-batches than the training has, so passes are repeated until there
    # are enough.
    while number < batch_count:
        previous_number = number
        for _ in loader:
            if number == 0:
                start_time = time.perf_counter()
            number += 1
            if number == batch_count:
                # The clock is read before the loader ends its processes, because their end is not measured.
                end_time = time.perf_counter()
                break
        if number == previous_number:
            raise ValueError(f"the samples do not fill a micro-batch of {b} in any of {processes} processes")
    return {"seconds": end_time - start_time, "micro_batches": batch_count - 1}


class Contestant(NamedTuple):
    """Way to prepare or to stream data with one package, which must be installed."""

    task: str
    package: str
    run: Measurement


CONTESTANTS = {
    "prepare: mhmoe": Contestant("prepare", "ray", prepare_with_mhmoe),
    "prepare: datasets": Contestant("prepare", "datasets", prepare_with_datasets),
    "prepare: datasets, our encoder": Contestant("prepare", "datasets", prepare_with_our_encoder),
    "stream: mhmoe": Contestant("stream", "ray", stream_with_mhmoe),
    "stream: mosaicml-streaming": Contestant("stream", "streaming", stream_with_mosaicml),
    "stream: a bare pool": Contestant("stream", "ray", stream_with_pool),
}
OUR_CONTESTANTS = ("prepare: mhmoe", "stream: mhmoe")
IMAGE_CONTESTANTS = ("stream: mhmoe", "stream: a bare pool")
"""Keys of `CONTESTANTS` that are measured for a model with images."""
POOL_CHUNK = 4
"""Number of micro-batches that a process of the pool gets at a time."""


class Figures(NamedTuple):
    """Measurements of one package that prepares or streams data."""

    name: str
    rounds: list[dict[str, Any]]
    ratio_to_ours: float
    """Median over rounds of the ratio of the package's time to ours."""

    def median(self, key: str) -> float:
        """Return the median over rounds of a measurement, such as `seconds`."""
        return float(statistics.median(measurement[key] for measurement in self.rounds))


def run_contest(
    spec: RunSpec, names: list[str], rounds: int, processes: int, report: Callable[[str], None]
) -> Iterator[Figures]:
    """Measure several packages at preparing or streaming data in interleaved rounds, and yield the results of each.

    `names` are keys of `CONTESTANTS`, including the one of this project for each task. Streaming needs prepared data. A
    measurement that fails is a JobError.
    """
    results_by_name: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn, name in turns(names, rounds):
        result = run_in_process(CONTESTANTS[name].run, spec, processes, f"bench ingest, {name}")
        report(f"round {turn + 1}: {name} took {result['seconds']:.1f} s")
        results_by_name[name].append(result)
    for name, results in results_by_name.items():
        our_results = results_by_name[next(n for n in OUR_CONTESTANTS if CONTESTANTS[n].task == CONTESTANTS[name].task)]
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(results, our_results, strict=True)]
        yield Figures(name, results, statistics.median(ratios))
