"""Export a run's checkpoint to a folder that other tools read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhmoe_ray.checkpoint.huggingface.adapters import choose_adapter
from mhmoe_ray.checkpoint.huggingface.config import (
    CONFIG,
    GENERATION,
    SECTION,
    ExportResult,
    MhmoeSection,
    build_config,
)
from mhmoe_ray.checkpoint.huggingface.files import INDEX, new_folder, report_read_errors, write_files
from mhmoe_ray.checkpoint.huggingface.model_card import CARD, build_card
from mhmoe_ray.checkpoint.huggingface.names import TensorEntry, tensor_entries
from mhmoe_ray.checkpoint.huggingface.tokenizer import (
    TOKENIZER_CONFIG,
    add_start_token,
    remove_start_token,
    tokenizer_config,
    tokenizer_identity,
)
from mhmoe_ray.checkpoint.load import WeightsReader
from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.checkpoint.tokenizer import run_tokenizer
from mhmoe_ray.data.tokenizer import boundaries, load_tokenizer, token_count
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs.directory import CHAT_TEMPLATE, RunDir
from mhmoe_ray.storage import Location, replace_file, write_json

CODE_FILES = tuple(Path(__file__).with_name(name) for name in ("configuration_mhmoe.py", "modeling_mhmoe.py"))
"""Code of MH-MoE models, which transformers lacks; an export of such a model contains copies."""


def check_exportable(checkpoint: Location, manifest: CheckpointManifest) -> None:
    """Raise a CheckpointError for another model than a decoder, and for router `domain`."""
    if not manifest.model.family.predicts_next_token:
        reason = f"its model is {manifest.model.family.title}, for which there is no exported form"
        raise CheckpointError(f"checkpoint {checkpoint}", reason, "export a decoder")
    if manifest.model.moe is not None and manifest.model.moe.router == "domain":
        reason = "its router needs the domain of a text, which other tools do not give"
        raise CheckpointError(f"checkpoint {checkpoint}", reason, "export a model with a learned router")


def export(checkpoint: Location, manifest: CheckpointManifest, target: Path) -> ExportResult:
    """Export a verified checkpoint to a new or empty folder in Hugging Face's layout, one layer at a time in memory.

    The folder gets safetensors with their index, config.json, generation_config.json, tokenizer.json,
    tokenizer_config.json, a model card and, if they exist, chat_template.jinja and the code of the model's classes. It
    gets its name when it is complete. A failure to read or write, a missing or changed tokenizer, or a model that
    `check_exportable` refuses is a CheckpointError.
    """
    check_exportable(checkpoint, manifest)
    tokenizer = run_tokenizer(checkpoint, manifest)
    with new_folder(target) as folder:
        return _write_folder(folder, checkpoint, manifest, tokenizer)


def _write_folder(
    folder: Path, checkpoint: Location, manifest: CheckpointManifest, tokenizer: Location
) -> ExportResult:
    adapter = choose_adapter(manifest.model, manifest.seq_len)
    groups = tensor_entries(manifest.model, adapter.name_replacements)
    # The files are read before anything is written, because errors of reading and of writing have different messages.
    with report_read_errors(f"checkpoint {checkpoint}", "repair its storage, or use another one"):
        weights = WeightsReader(checkpoint)
        template = tokenizer.parent / CHAT_TEMPLATE
        file_contents = {
            file.name: file.read_bytes() for file in (tokenizer, template) if file == tokenizer or file.exists()
        }
    dtypes = {name: slices[0].dtype for name, slices in weights.index.items()}
    names = write_files(folder, _exported_groups(checkpoint, groups, weights), len(groups))
    loaded_tokenizer = load_tokenizer(tokenizer, manifest.model.vocab_size)
    change_tokenizer = add_start_token if manifest.adds_start else remove_start_token
    file_contents[tokenizer.name] = change_tokenizer(file_contents[tokenizer.name])
    if adapter.model_type == "mhmoe":
        file_contents |= {file.name: file.read_bytes() for file in CODE_FILES}
    file_contents[CARD] = build_card(RunDir.of_checkpoint(checkpoint), manifest, adapter.model_type).encode()
    for name, text in file_contents.items():
        replace_file(folder / name, text)
    template_text = file_contents[CHAT_TEMPLATE].decode() if CHAT_TEMPLATE in file_contents else None
    edges = boundaries(loaded_tokenizer)
    edges = edges._replace(ends=edges.ends.union(manifest.ends))
    settings = tokenizer_config(loaded_tokenizer, edges, manifest.seq_len, template_text)
    write_json(folder / TOKENIZER_CONFIG, settings)
    edge_tokens = {
        "bos_token_id": edges.start,
        "eos_token_id": sorted(edges.ends),
        "pad_token_id": loaded_tokenizer.token_to_id(settings["pad_token"]),
    }
    section = MhmoeSection(
        model=manifest.model,
        seq_len=manifest.seq_len,
        tokenizer_sha256=tokenizer_identity(file_contents[tokenizer.name]),
        adds_start=manifest.adds_start,
    )
    config = {
        **build_config(manifest.model, manifest.seq_len, token_count(loaded_tokenizer)),
        "dtype": str(dtypes["embedding.weight"]).removeprefix("torch."),
        **edge_tokens,
        SECTION: section.model_dump(mode="json"),
    }
    write_json(folder / CONFIG, config)
    generation_config: dict[str, Any] = {**edge_tokens}
    if unused_rows := list(range(token_count(loaded_tokenizer), manifest.model.vocab_size)):
        # Embedding rows beyond the tokenizer's last token stand for no text, so an answer must not contain them.
        generation_config["suppress_tokens"] = unused_rows
    write_json(folder / GENERATION, generation_config)
    total_bytes = sum(
        dtypes[e.checkpoint_name].itemsize * torch.Size(e.shape).numel() for group in groups for e in group
    )
    write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(names.items()))})
    return ExportResult(config["model_type"], len(names), total_bytes, checkpoint.name)


def _exported_groups(
    checkpoint: Location, groups: list[list[TensorEntry]], weights: WeightsReader
) -> Iterator[dict[str, Tensor]]:
    """Load a checkpoint's tensors group by group, and yield the exported tensors of each group by name."""
    for group in groups:
        with report_read_errors(f"checkpoint {checkpoint}", "repair its storage, or use another one"):
            shapes = {e.checkpoint_name: e.shape for e in group}
            tensors = weights.read(shapes)
        yield {name: part for e in group for name, part in e.split(tensors.pop(e.checkpoint_name)).items()}
