"""Loading of a checkpoint to answer requests: engine, tokenizer and chat template.

The engines are in the table `ENGINES` of `spec/serve.py`. The library that an engine computes with is imported only
when that engine is loaded. A process that only checks whether a model can be served does not need the library.
"""

from collections.abc import Iterable
from pkgutil import resolve_name
from typing import Protocol

from tokenizers import Tokenizer

from mhmoe_ray.checkpoint.manifest import CheckpointManifest, read_manifest
from mhmoe_ray.checkpoint.tokenizer import load_run_tokenizer
from mhmoe_ray.data.tokenizer import boundaries, token_count
from mhmoe_ray.errors import ServeError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serving.answer import Answerer, ModelDetails, ServedModel, load_chat_template
from mhmoe_ray.serving.engine import Engine
from mhmoe_ray.serving.family import serving_of
from mhmoe_ray.spec import ModelSpec, ServeSpec
from mhmoe_ray.spec.serve import ENGINES
from mhmoe_ray.storage import Location


def check_served(manifest: CheckpointManifest, spec: ServeSpec, run: RunDir) -> None:
    """Check that a model of any kind can be served here, without starting the engine.

    Args:
        manifest: the checkpoint's manifest.
        spec: section `serve` of a spec, which names the engine.
        run: directory of the run that wrote the checkpoint.

    Raises:
        ServeError: the engine or a package is not installed, or the engine cannot compute this model.
    """
    serving_of(manifest.model.kind).check(manifest, spec, run)


def check_engine(manifest: CheckpointManifest, spec: ServeSpec) -> None:
    """Check that the spec's engine is installed here and can generate text with the model, without starting it.

    Raises:
        ServeError: the engine is not installed, or cannot compute this model.
    """
    check_generates(manifest.model)
    if (check := ENGINES[spec.engine].check) is not None:
        resolve_name(check)(manifest.model, spec)


def check_predicts(model: ModelSpec) -> None:
    """Raise ServeError if a model is not a decoder, and therefore does not predict next tokens."""
    family = model.family
    if not family.predicts_next_token:
        reason = f"it is {family.title}, which does not predict next tokens"
        raise ServeError("the model", reason, f"ask it for {family.answers} with `mhmoe serve deploy`")


def check_generates(model: ModelSpec) -> None:
    """Raise ServeError if a model cannot generate text.

    A model cannot if it is not a decoder, or if its router needs the domain (source) of a text, which a prompt does not
    name.
    """
    check_predicts(model)
    moe = model.moe
    if moe is not None and moe.router == "domain":
        reason = "its router needs the domain of a text, which a prompt does not name"
        raise ServeError("the model", reason, "evaluate it with `mhmoe eval`; models with a learned router are served")


class StartEngine(Protocol):
    """Signature of the functions that start an engine for a checkpoint."""

    def __call__(
        self,
        checkpoint: Location,
        manifest: CheckpointManifest,
        stop_token_ids: frozenset[int],
        tokenizer_size: int,
        spec: ServeSpec,
    ) -> Engine:
        """Start the engine with the model of a checkpoint, and return it.

        Args:
            checkpoint: the checkpoint directory inside its run directory.
            manifest: the checkpoint's manifest, whose weights were verified.
            stop_token_ids: tokens that end an answer and are not part of it.
            tokenizer_size: number of tokens of the tokenizer; only ids below this number are sampled.
            spec: precision, and limits on numbers of requests.

        Raises:
            CheckpointError: the weights do not belong to the manifest's model.
            ServeError: the engine cannot compute this model.
        """


def load_engine(checkpoint: Location, manifest: CheckpointManifest, tokenizer: Tokenizer, spec: ServeSpec) -> Engine:
    """Start the engine that the spec names, with the model of a checkpoint, and return it.

    Args:
        checkpoint: the checkpoint directory inside its run directory.
        manifest: the checkpoint's manifest, whose weights were verified.
        tokenizer: the run's tokenizer, which has tokens for the start and end of a document.
        spec: engine, precision, and limits on numbers of requests.

    Raises:
        CheckpointError: the weights do not belong to the manifest's model.
        ServeError: the engine is not installed, or cannot compute this model.
    """
    check_engine(manifest, spec)
    start: StartEngine = resolve_name(ENGINES[spec.engine].start)
    return start(checkpoint, manifest, *token_limits(tokenizer, manifest.ends), spec)


def token_limits(tokenizer: Tokenizer, ends: Iterable[int]) -> tuple[frozenset[int], int]:
    """Return the token ids that end an answer, and the number of token ids, counted from 0, that may be sampled.

    Args:
        tokenizer: the model's tokenizer, which has tokens for the start and end of a document.
        ends: token ids that end a text in addition to the tokenizer's own end tokens.
    """
    # The model may have logits for more ids than the tokenizer has tokens, and the engine must not sample an id that
    # has no text.
    return boundaries(tokenizer).ends.union(ends), token_count(tokenizer)


def load_served(checkpoint: Location, spec: ServeSpec) -> ServedModel:
    """Load a checkpoint of any kind of model, and return the model with its started engine.

    Args:
        checkpoint: a checkpoint directory inside its run directory.
        spec: engine, precision, and limits on numbers of requests.

    Raises:
        CheckpointError, DataError: the checkpoint, or the run's tokenizer or list of classes, is missing or damaged.
        ServeError: the engine is not installed, or cannot compute this model, or the run's chat template is invalid.
    """
    manifest = read_manifest(checkpoint, parts=("weights",))
    return serving_of(manifest.model.kind).load(checkpoint, spec, manifest)


def load_answerer(checkpoint: Location, spec: ServeSpec, manifest: CheckpointManifest | None = None) -> Answerer:
    """Start the engine that the spec names, and return it with the tokenizer and the chat template of the checkpoint.

    Args:
        checkpoint: a checkpoint directory inside its run directory.
        spec: engine, precision, and limits on numbers of requests.
        manifest: the checkpoint's manifest, if its weights have just been verified. Without it, the weights are hashed
            first to verify them.

    Raises:
        CheckpointError, DataError: the checkpoint or the run's tokenizer is missing or damaged.
        ServeError: the engine is not installed, or cannot compute this model, or the run's chat template is invalid.
    """
    # The import is here because a process that only checks whether an engine can serve a model needs no torch.
    import torch

    # This limits only the present thread. If it started OpenMP threads of its own, they would slow down those of the
    # engine (see `TorchEngine`).
    torch.set_num_threads(1)
    manifest = manifest or read_manifest(checkpoint, parts=("weights",))
    tokenizer = load_run_tokenizer(checkpoint, manifest)
    run = RunDir.of_checkpoint(checkpoint)
    template = load_chat_template(run, tokenizer)
    details = ModelDetails.from_spec(f"{run.id}/{checkpoint.name}", manifest.model)
    engine = load_engine(checkpoint, manifest, tokenizer, spec)
    return Answerer(engine, tokenizer, template, details, manifest.adds_start)
