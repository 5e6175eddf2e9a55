"""Preparation of text as shards, and streaming of micro-batches, by several packages in interleaved rounds.

Our preparation is compared with Hugging Face's datasets, our stream with MosaicML's streaming, and the stream of a
model with images with a bare pool of processes that decode and crop the same images. Each measurement runs in a process
and an empty folder of its own.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.data
from tokenizers import Tokenizer

from mhmoe_ray.bench.processes import Measurement, run_in_process
from mhmoe_ray.bench.timing import installed_contestants, measure_rounds
from mhmoe_ray.cli.formats import format_bytes
from mhmoe_ray.data.family import data_of
from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.data.samples import TrainingSamples
from mhmoe_ray.data.shards.manifest import TOKENIZER_FILE, require_data_manifest
from mhmoe_ray.data.shards.reader import ShardReader
from mhmoe_ray.data.shards.recipe import require_prepared_data
from mhmoe_ray.data.sources import find_files
from mhmoe_ray.data.stream import training_stream
from mhmoe_ray.data.tokenizer import boundaries, document_encoder
from mhmoe_ray.errors import SpecError
from mhmoe_ray.spec import RunSpec
from tests.benchmarks.harness import Results
from tests.benchmarks.process_memory import PeakMemory


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


def measure(spec: RunSpec, peers: bool, rounds: int, processes: int, report: Callable[[str], None]) -> Results:
    """Measure the packages that can prepare or stream the spec's data; `peers` adds those of others.

    The stream is timed on the spec's own prepared data, which must exist. A measurement that fails is a JobError.
    """
    has_images = data_of(spec.model).has_rows
    if spec.data.tokenizer is None and not has_images:
        fix = "prepare it, set data.tokenizer to the tokenizer.json in there and data.prepared to another folder"
        raise SpecError("ingest", "the spec has no data.tokenizer", fix)
    require_prepared_data(spec)
    if has_images:
        names = list(IMAGE_CONTESTANTS)
    elif peers:
        packages = {name: c.package for name, c in CONTESTANTS.items() if name not in IMAGE_CONTESTANTS[1:]}
        names = installed_contestants(packages, report)
    else:
        names = list(OUR_CONTESTANTS)
    rounds_by_name = run_contest(spec, names, rounds, processes, report)
    ratios = {name: ratio_to_ours(name, rounds_by_name) for name in names}
    rows = []
    for name, results in rounds_by_name.items():
        seconds, first_round = statistics.median(result["seconds"] for result in results), results[0]
        # A preparation reports a number of tokens, and a data stream a number of micro-batches, so their rates differ
        # in unit.
        unit = "tokens" if "tokens" in first_round else "micro_batches"
        rate = f"{first_round[unit] / seconds:,.0f} {unit.replace('_', '-')}/s"
        peaks = [result["peak_bytes"] for result in results if "peak_bytes" in result]
        peak = format_bytes(round(statistics.median(peaks))) if peaks else ""
        rows.append((name, f"{seconds:.1f} s", rate, f"{ratios[name]:.2f}", peak))
    b, length = spec.train.micro_batch_size, spec.data.seq_len
    samples = f"{b} samples" if has_images else f"{b} x {length:,} tokens"
    title = f"{processes} processes each, micro-batches of {samples}; {rounds} rounds in turn"
    figures = {name: {"rounds": results, "to_ours": ratios[name]} for name, results in rounds_by_name.items()}
    data = {"processes": processes, "micro_batch_size": b, "seq_len": length, "figures": figures}
    return Results(title, ("", "median", "", "time to ours", "largest process"), rows, data)


def run_contest(
    spec: RunSpec, names: list[str], rounds: int, processes: int, report: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """Measure contestants, given by keys of `CONTESTANTS`, in interleaved rounds, and return their results by name."""

    def measure_contestant(name: str, number: int) -> dict[str, Any]:
        result = run_in_process(CONTESTANTS[name].run, spec, processes, f"ingest, {name}")
        report(f"round {number + 1}: {name} took {result['seconds']:.1f} s")
        return result

    return measure_rounds(names, rounds, measure_contestant)


def ratio_to_ours(name: str, rounds_by_name: dict[str, list[dict[str, Any]]]) -> float:
    """Return the median over rounds of the ratio of a contestant's time to that of our own for the same task."""
    our_name = next(n for n in OUR_CONTESTANTS if CONTESTANTS[n].task == CONTESTANTS[name].task)
    result_pairs = zip(rounds_by_name[name], rounds_by_name[our_name], strict=True)
    ratios: list[float] = [result["seconds"] / our_result["seconds"] for result, our_result in result_pairs]
    return statistics.median(ratios)
