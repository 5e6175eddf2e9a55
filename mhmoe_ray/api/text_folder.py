"""A spec for the text in a folder, which trains on this machine in minutes: what `mhmoe init` writes."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from mhmoe_ray.data.sources import Document, FileReader, RawFile, find_files
from mhmoe_ray.errors import DataError
from mhmoe_ray.planner.presets import SIZES, SizeName
from mhmoe_ray.spec.base import NAME_LENGTH
from mhmoe_ray.spec.raw_text import raw_text_sections

SIZE: SizeName = "tiny"
MIN_CHARACTERS = 256
"""Fewest characters of the largest domain, from which samples of 8 tokens can be cut even if each token is a word."""
MIN_VOCABULARY, MIN_STEPS = 512, 100
SMALL_TEXT = 1_000_000
"""Characters below which a tenth of the documents is held out, so that the validation loss says something."""
CHARACTERS_PER_TOKEN = 3
"""Characters of English in a token of a vocabulary of a few thousand entries, to estimate the number of epochs."""
EPOCHS = 16
"""Number of times that a small text is read; repeating it more often teaches little (arXiv 2305.16264)."""

_SPEC = """\
# Made by `mhmoe init` from {files} of text with {total:,} bytes.
# `mhmoe schema` prints all keys, `mhmoe presets` all models, and `mhmoe plan` what a spec costs.
name: {name}

# The smallest MH-MoE, which trains on two CPU cores in minutes; `size: small` takes hours there.
preset: mhmoe
size: {size}
model:
  vocab_size: {vocab_size}  # of a tokenizer that is trained on the text

data:
  sources:  # a source's subfolders are domains; several sources have weights
    text: {{path: {path}}}
  prepared: data/{name}  # tokenized samples, which are made once
  seq_len: {seq_len}
  validation_fraction: {validation_fraction}  # share of the documents that are held out
{max_bad_lines}
train:
  steps: {steps}  # of {tokens_per_step:,} tokens, which read the text about {epochs} times

# cluster: {{gpus_per_worker: 1}}  # trains on a GPU
"""


class TextSpec(NamedTuple):
    """Spec for the text in a folder, as a YAML file with comments."""

    text: str
    omissions: dict[str, str]
    """Parts of the folder that the spec leaves out, with the reason."""


def make_text_spec(folder: Path) -> TextSpec:
    """Return a spec that trains on the text in a folder or file; a DataError says that there is none, or too little."""
    path, files, omissions = _find_source(folder)
    characters = Counter[str]()
    for file in files:
        characters[file.domain] += _characters(file)
    total, largest = characters.total(), max(characters.values())
    if largest < MIN_CHARACTERS:
        fix = f"add text: a folder needs at least {MIN_CHARACTERS} bytes"
        raise DataError(f"folder {folder}", f"its text of {total} bytes is too short to train on", fix)
    # A small vocabulary and short samples make enough samples of a small text.
    size = SIZES[SIZE]
    vocab_size = min(size.vocab_size, max(MIN_VOCABULARY, _power_of_two(total // 64)))
    seq_len = min(size.seq_len, _power_of_two(largest // 32))
    tokens, tokens_per_step = total / CHARACTERS_PER_TOKEN, size.micro_batches * size.micro_batch_size * seq_len
    steps = min(size.steps, max(MIN_STEPS, round(EPOCHS * tokens / tokens_per_step)))
    empty_count = sum(not file.size for file in files)
    text = _SPEC.format(
        files=f"{len(files):,} file{'s' if len(files) > 1 else ''}",
        total=total,
        name=re.sub("[^a-z0-9]+", "-", folder.resolve().stem.lower())[:NAME_LENGTH].strip("-") or "text",
        size=SIZE,
        vocab_size=vocab_size,
        path=json.dumps(str(path), ensure_ascii=False),
        seq_len=seq_len,
        validation_fraction=0.1 if total < SMALL_TEXT else 0.01,
        max_bad_lines=f"  max_bad_lines: {empty_count}  # empty files\n" if empty_count else "",
        steps=steps,
        tokens_per_step=tokens_per_step,
        epochs=f"{steps * tokens_per_step / tokens:.2g}",
    )
    return TextSpec(text, omissions)


def _find_source(folder: Path) -> tuple[Path, list[RawFile], dict[str, str]]:
    """Return the folder with its files if all of it can be read as one source, else its part with the most text.

    The parts are its subfolders and a pattern for the files in itself; the reasons against other parts come last.
    """
    if not folder.exists():
        raise DataError(f"folder {folder}", "it does not exist", "name a folder that has text")
    files_by_path, omissions, folder_reason = dict[Path, list[RawFile]](), dict[str, str](), ""
    # An environment of Python has many text files, which nobody means to train on.
    environments = {path.parent for path in folder.glob("*/pyvenv.cfg")}
    try:
        if not environments:
            return folder, _text_files(folder), {}
    except DataError as e:
        folder_reason = e.reason
    paths = [] if folder.is_file() else [folder / "*", *sorted(set(folder.glob("[!._]*/")) - environments)]
    for path in paths:
        try:
            files_by_path[path] = _text_files(path)
        except DataError as e:
            omissions[str(path)] = e.reason
    if not files_by_path:
        reason = f"no text in it can be read: {folder_reason or '; '.join(omissions.values())}"
        raise DataError(f"folder {folder}", reason, "put text into it, or write a spec that says how to read it")
    best_path = max(files_by_path, key=lambda path: sum(map(_characters, files_by_path[path])))
    omissions |= {
        str(path): "it would be another source, so add it to data.sources"
        for path in files_by_path
        if path != best_path
    }
    return best_path, files_by_path[best_path], omissions


def _text_files(path: Path) -> list[RawFile]:
    """Return the files of a folder, file or pattern; a DataError says why they, or the largest, cannot be read."""
    data, _ = raw_text_sections([str(path)])
    files = find_files(data)
    first_item = next(iter(FileReader(max(files, key=_characters), data)), None)
    if isinstance(first_item, Document):
        return files
    reason = f"{first_item.path}: {first_item.message}" if first_item else "it has no document"
    raise DataError(f"source {path}", reason, "correct it")


def _characters(file: RawFile) -> int:
    return file.size * file.inflation


def _power_of_two(limit: int) -> int:
    """Return the largest power of two up to `limit`, but at least 1."""
    return 1 << max(0, limit.bit_length() - 1)
