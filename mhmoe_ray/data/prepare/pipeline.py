"""Raw text to packed shards as two Ray Data passes: tokenise file by file, then pack domain by domain.

The result depends on the files and the settings only, never on how many tasks ran at once. It appears under its name in
one rename, when it is whole.
"""

import errno
import json
import pickle
import shutil
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import ray
import ray.data
from tokenizers import Tokenizer

from mhmoe_ray.data import SAYS
from mhmoe_ray.data.prepare.baselines import baselines
from mhmoe_ray.data.prepare.held_out import is_validation
from mhmoe_ray.data.prepare.pack import pack, pack_validation
from mhmoe_ray.data.prepare.quarantine import FILE, Limit, entry
from mhmoe_ray.data.shards.files import ShardReader, ShardWriter, padding_token, token_bytes_for, token_dtype
from mhmoe_ray.data.shards.manifest import (
    Baselines,
    DataManifest,
    Domain,
    Shard,
    check_recipe,
    read_data_manifest,
    recipe,
)
from mhmoe_ray.data.sources import Document, RawFile, Reading, Tally, find_files
from mhmoe_ray.data.tokenizer import document_encoder, load_tokenizer, store_given, train_tokenizer
from mhmoe_ray.errors import DataError
from mhmoe_ray.runs.manifest import describe_file
from mhmoe_ray.runs.state import write_json
from mhmoe_ray.spec import DataSpec, RunSpec

DOCUMENTS_PER_CALL = 64
BASELINE_TOKENS = 20_000_000


def prepare(spec: RunSpec) -> DataManifest:
    """The prepared folder of a spec, made if it is missing. Needs a running Ray.

    Raises:
        DataError: sources are missing, more lines are bad than allowed, or the folder was made with other settings.
    """
    folder = spec.data.prepared
    manifest = read_data_manifest(folder)
    if manifest is None:
        partial_folder = folder.with_name(f"{folder.name}.partial-{uuid4().hex[:6]}")
        partial_folder.mkdir(parents=True)
        try:
            manifest = _prepare_into(partial_folder, spec)
            manifest = _publish(partial_folder, folder) or manifest
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)
    check_recipe(folder, manifest, spec)
    return manifest


def _publish(made: Path, folder: Path) -> DataManifest | None:
    """Give the folder its name; if another job was first, what that one made."""
    try:
        made.rename(folder)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return read_data_manifest(folder)
    return None


def _prepare_into(folder: Path, spec: RunSpec) -> DataManifest:
    ray.data.DataContext.get_current().enable_progress_bars = False
    files = find_files(spec.data)
    print(f"{SAYS}tokenizer for {len(files)} files", flush=True)
    _make_tokenizer(folder, files, spec)
    token_bytes = token_bytes_for(spec.model.vocab_size)
    parts = folder / "parts"
    parts.mkdir()
    print(f"{SAYS}tokenising {len(files)} files", flush=True)
    limit = Limit(spec.data, sum(file.size for file in files))
    rows = [{"number": i, **file._asdict()} for i, file in enumerate(files)]
    tokenise = partial(
        _tokenise_file,
        parts=parts,
        tokenizer=folder / "tokenizer.json",
        spec=spec.data,
        limit=limit,
        token_bytes=token_bytes,
    )
    done, tally = [], Tally()
    for row in ray.data.from_items(rows, override_num_blocks=len(rows)).map(tokenise).iter_rows():
        row["tally"] = pickle.loads(row["tally"])
        done.append(row)
        tally += row["tally"]
        if row["stopped"] or limit.hopeless(tally):
            raise limit.error(tally)
    if limit.exceeded(tally):
        raise limit.error(tally)
    done.sort(key=lambda row: row["number"])
    with (folder / FILE).open("wb") as out:
        for row in done:
            out.write(_part(parts, row["number"], "quarantine").read_bytes())

    by_domain: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in done:
        by_domain[row["domain"]].append(row)
    print(f"{SAYS}packing {len(by_domain)} domains and languages", flush=True)
    pack_one = partial(_pack_domain, folder=folder, seq_len=spec.data.seq_len, token_bytes=token_bytes)
    items = [{"domain": d, "numbers": [r["number"] for r in rows]} for d, rows in by_domain.items()]
    packed = ray.data.from_items(items, override_num_blocks=len(items)).map(pack_one).take_all()
    domains = {}
    for row in sorted(packed, key=lambda r: r["domain"]):
        domains[row["domain"]] = _domain(by_domain[row["domain"]], json.loads(row["packed"]))
    _check_not_empty(domains)

    validation, figures, predicted = ray.get(
        ray.remote(_finish_validation).options(num_cpus=1).remote(folder, sorted(domains), domains, spec)
    )
    shutil.rmtree(parts)
    manifest = DataManifest(
        recipe=recipe(spec),
        seq_len=spec.data.seq_len,
        token_bytes=token_bytes,
        tokenizer_sha256=describe_file(folder / "tokenizer.json").sha256,
        domains=domains,
        validation=validation,
        validation_tokens=predicted,
        baselines=figures,
        bad_lines=tally.bad.total(),
    )
    write_json(folder / "manifest.json", manifest.model_dump(mode="json"))
    return manifest


def _domain(rows: list[dict[str, Any]], packed: dict[str, Any]) -> Domain:
    tally = Tally()
    for row in rows:
        tally += row["tally"]
    held_out = sum(row["validation_documents"] for row in rows)
    return Domain(
        documents=tally.documents - held_out,
        validation_documents=held_out,
        quarantined=dict(tally.bad),
        dropped=dict(tally.dropped),
        **packed,
    )


def _check_not_empty(domains: dict[str, Domain]) -> None:
    """Here and not in a task, since Ray would wrap the error in a traceback."""
    if not any(d.validation_documents for d in domains.values()):
        fix = "raise data.validation_fraction or add documents"
        raise DataError("validation", "no document fell into the held-out share", fix)
    if not any(d.samples for d in domains.values()):
        raise DataError("training", "no domain fills a single sample", "shorten data.seq_len or add documents")


def _make_tokenizer(folder: Path, files: list[RawFile], spec: RunSpec) -> None:
    vocab_size = spec.model.vocab_size
    if spec.data.tokenizer is not None:
        store_given(spec.data, vocab_size, folder / "tokenizer.json")
        return
    train = ray.remote(train_tokenizer).options(num_cpus=1)
    tokenizer: Tokenizer = ray.get(train.remote(files, spec.data, vocab_size))
    tokenizer.save(str(folder / "tokenizer.json"))
    load_tokenizer(folder / "tokenizer.json", vocab_size)


def _tokenise_file(
    row: dict[str, Any], *, parts: Path, tokenizer: Path, spec: DataSpec, limit: Limit, token_bytes: int
) -> dict[str, Any]:
    """One raw file to two raw token streams, training and held out, and its quarantine."""
    encoder = document_encoder(tokenizer)
    number = row["number"]
    reading = Reading(RawFile(*(row[name] for name in RawFile._fields)), spec)
    held_out_documents, stopped = 0, False

    def texts() -> Iterator[str]:
        nonlocal stopped
        with _part(parts, number, "quarantine").open("w", encoding="utf-8") as quarantine:
            for item in reading:
                if isinstance(item, Document):
                    yield item.text
                    continue
                quarantine.write(entry(row["domain"], item))
                stopped = limit.hopeless(reading.tally)
                if stopped:
                    return

    streams = [_part(parts, number, kind) for kind in ("train", "validation")]
    with streams[0].open("wb") as train, streams[1].open("wb") as validation:
        readable = texts()
        while batch := list(islice(readable, DOCUMENTS_PER_CALL)):
            for text, ids in zip(batch, encoder.encode(batch), strict=True):
                held_out = is_validation(text, spec.validation_fraction)
                held_out_documents += held_out
                out = validation if held_out else train
                out.write(np.asarray(ids, token_dtype(token_bytes)).tobytes())
    return {
        "number": number,
        "domain": row["domain"],
        "validation_documents": held_out_documents,
        "tally": pickle.dumps(reading.tally),
        "stopped": stopped,
    }


def _part(parts: Path, number: int, kind: str) -> Path:
    return parts / f"{number:06d}.{kind}"


def _pack_domain(row: dict[str, Any], *, folder: Path, seq_len: int, token_bytes: int) -> dict[str, Any]:
    parts = folder / "parts"
    numbers = [int(n) for n in row["numbers"]]
    writer = ShardWriter(folder, f"train/{row['domain']}", seq_len, token_bytes)
    packed = pack([_part(parts, n, "train") for n in numbers], writer, seq_len, token_bytes)
    held_out = pack_validation([_part(parts, n, "validation") for n in numbers], seq_len, token_bytes)
    np.save(parts / f"{row['domain'].replace('/', '.')}.npy", held_out)
    fields = packed._asdict() | {"shards": [s.model_dump() for s in packed.shards]}
    return {"domain": row["domain"], "packed": json.dumps(fields)}


def _finish_validation(
    folder: Path, names: list[str], domains: dict[str, Domain], spec: RunSpec
) -> tuple[list[Shard], Baselines, int]:
    """Choose the validation samples evenly from all held-out ones, write them, and count the baselines."""
    token_bytes, vocab_size = token_bytes_for(spec.model.vocab_size), spec.model.vocab_size
    every = np.concatenate([np.load(folder / "parts" / f"{name.replace('/', '.')}.npy") for name in names])
    chosen = every[np.unique(np.linspace(0, len(every) - 1, spec.data.validation_samples).round().astype(int))]
    writer = ShardWriter(folder, "validation", spec.data.seq_len, token_bytes)
    writer.write(chosen)
    part = min(1.0, BASELINE_TOKENS / sum(domain.tokens for domain in domains.values()))
    counted = []
    for name in names:
        if domains[name].samples:
            reader = ShardReader(folder, domains[name].shards, token_bytes)
            counted.append(reader.read(np.arange(ceil(part * len(reader)))))
    padding = padding_token(token_bytes)
    figures = baselines(np.concatenate(counted), chosen, vocab_size, padding)
    return writer.close(), figures, int((chosen[:, 1:] != padding).sum())
