"""Models that a run can start from, found by the names that `start.from` gives them in a spec."""

from pathlib import Path
from typing import NamedTuple

from mhmoe_ray.checkpoint.find import find_run_or_checkpoint, no_checkpoint_error
from mhmoe_ray.checkpoint.huggingface.config import CONFIG, is_adapter_folder, read_config
from mhmoe_ray.checkpoint.huggingface.hub import PREFIX, pinned_source, settings_folder
from mhmoe_ray.checkpoint.huggingface.imported_tokenizer import read_chat_template, read_folder_tokenizer
from mhmoe_ray.checkpoint.huggingface.peft_config import model_folder
from mhmoe_ray.checkpoint.manifest import MANIFEST, CheckpointManifest, newest_checkpoint, stored_manifest
from mhmoe_ray.checkpoint.tokenizer import run_tokenizer
from mhmoe_ray.data.shards.manifest import TOKENIZER_FILE
from mhmoe_ray.errors import CheckpointError, SpecError
from mhmoe_ray.runs.directory import CHAT_TEMPLATE, RunDir
from mhmoe_ray.runs.start import Ancestor, read_start
from mhmoe_ray.spec import ModelSpec, RunSpec
from mhmoe_ray.storage import Location, location

SWEEP_PREFIX = "sweep:"
"""Prefix of a `start.from` that names another run of the same sweep."""


class StartModel(NamedTuple):
    """A model that a run can start from: everything but its weights."""

    source: str
    """Value of `start.from` that names exactly this model in any working directory: an absolute path, or a model of the
    Hugging Face hub with its revision."""
    ancestor: Ancestor
    """Entry for this model in the new run's start record."""
    path: Location
    """Path of a run's checkpoint, or of a folder in Hugging Face's layout."""
    model: ModelSpec
    seq_len: int
    tokenizer_file: Location
    adds_start: bool
    ends: list[int]
    """Token ids that end a text, in addition to the tokenizer's own."""
    manifest: CheckpointManifest | None = None
    """Manifest of the checkpoint; None for a folder."""
    model_type: str | None = None
    """`model_type` of the folder's config.json; None for a checkpoint."""
    chat_template: str | None = None
    chat_template_file: Location | None = None
    """File with the chat template; None without one, or if it is an entry of tokenizer_config.json."""
    sibling: RunSpec | None = None
    """Spec of the run if the model is another run of the same sweep, which may not exist yet."""

    @property
    def run(self) -> RunDir | None:
        """The run of the checkpoint; None for a folder."""
        return None if self.manifest is None else RunDir.of_checkpoint(self.path)

    @property
    def has_moments(self) -> bool:
        """True if the optimizer's state can be copied; another run of the sweep is assumed to save it."""
        return self.sibling is not None or (self.manifest is not None and self.manifest.has_moments)


def find_start_model(source: str, storage: Location | str) -> StartModel:
    """Return the model that a value of `start.from` names, without its weights.

    The value is a run, RUN@STEP, the folder of a checkpoint or of a model in Hugging Face's layout, or
    hf:ORGANIZATION/NAME with or without @REVISION. An unknown run is a RunError, an unreadable model a CheckpointError,
    a folder's tokenizer that does not fit a DataError.
    """
    if source.startswith(PREFIX):
        folder = settings_folder(source)
        return _folder_model(pinned_source(source, folder), folder)
    path = location(source)
    if isinstance(path, Path) and (is_adapter_folder(path) or (path / CONFIG).is_file()):
        return _folder_model(str(path.absolute()), path.absolute())
    if (path / MANIFEST).exists() and not RunDir(path).attempts_file.exists():
        return _checkpoint_model(path.absolute())
    target = find_run_or_checkpoint(source, storage, f"start.from {source}")
    if not isinstance(target, RunDir):
        return _checkpoint_model(target)
    newest = newest_checkpoint(target, ("weights",), None)
    if newest is None:
        error = no_checkpoint_error(target)
        raise CheckpointError(f"start.from {source}", error.reason, error.fix)
    return _checkpoint_model(newest.checkpoint)


def _checkpoint_model(checkpoint: Location) -> StartModel:
    """Return the start model for a checkpoint inside its run directory; a vision model is a SpecError."""
    manifest, run = stored_manifest(checkpoint), RunDir.of_checkpoint(checkpoint)
    family = manifest.model.family
    if not family.has_tokenizer:
        reason = f"it is {family.title}, and start is for decoders and encoders"
        raise SpecError(f"start.from {run.id}", reason, "remove start")
    record = read_start(run)
    tokens = manifest.tokens + (record.tokens if record else 0)
    template = run.chat_template_file
    return StartModel(
        source=str(checkpoint),
        ancestor=Ancestor(name=run.id, path=str(checkpoint), step=manifest.step, tokens=tokens, start=record),
        path=checkpoint,
        manifest=manifest,
        model=manifest.model,
        seq_len=manifest.seq_len,
        tokenizer_file=run_tokenizer(checkpoint, manifest),
        adds_start=manifest.adds_start,
        ends=manifest.ends,
        chat_template=template.read_text() if template.exists() else None,
        chat_template_file=template if template.exists() else None,
    )


def _folder_model(source: str, folder: Path) -> StartModel:
    """Return the start model for a folder in Hugging Face's layout, which `start.from` names as `source`.

    An adapter in PEFT's layout is merged into its base. A folder that cannot be read, or whose tokenizer.json lacks the
    start token, is a CheckpointError.
    """
    settings = model_folder(folder)
    model_type, section = read_config(settings, None)
    tokenizer = read_folder_tokenizer(settings, section)
    tokenizer_file = settings / "tokenizer.json"
    if tokenizer.content != tokenizer_file.read_bytes():
        reason = "its tokenizer.json does not say which token starts a text, so training would refuse it"
        raise CheckpointError(f"start.from {source}", reason, "run `mhmoe ckpt import` and start from the imported run")
    return StartModel(
        source=source,
        ancestor=Ancestor(name=source, path=str(folder), step=0, tokens=0),
        path=folder,
        model_type=model_type,
        model=section.model,
        seq_len=section.seq_len,
        tokenizer_file=tokenizer_file,
        adds_start=tokenizer.adds_start,
        ends=tokenizer.end_tokens,
        chat_template=read_chat_template(settings),
        chat_template_file=template_file if (template_file := settings / CHAT_TEMPLATE).exists() else None,
    )


def sibling_model(source: str, sibling: RunSpec) -> StartModel:
    """Return the start model for another run of the sweep from its spec alone, because the run may not exist yet."""
    return StartModel(
        source=source,
        ancestor=Ancestor(name=sibling.name, path="", step=sibling.train.steps, tokens=0),
        path=Path(),
        model=sibling.model,
        seq_len=sibling.data.seq_len,
        tokenizer_file=sibling.data.prepared / TOKENIZER_FILE,
        adds_start=True,
        ends=[],
        sibling=sibling,
    )


def sweep_variant(source: str) -> str:
    """Return the variant of a sweep in a value of `start.from`, such as "dense" in "sweep:dense@200"."""
    return source.removeprefix(SWEEP_PREFIX).partition("@")[0]
