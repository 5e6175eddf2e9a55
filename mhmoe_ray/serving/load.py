"""Loading of a checkpoint to answer requests: engine, tokenizer and chat template.

An engine's library is imported when the engine is loaded, so that checks need no library.
"""

from collections.abc import Iterable, Mapping
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
    """Raise ServeError if the engine or a package is missing here, or the engine cannot compute this model."""
    if spec.max_adapters and not manifest.model.family.predicts_next_token:
        reason = f"adapters are for decoders, and the model is {manifest.model.family.title}"
        raise ServeError("serve.max_adapters", reason, "remove it")
    serving_of(manifest.model.kind).check(manifest, spec, run)


def check_engine(manifest: CheckpointManifest, spec: ServeSpec) -> None:
    """Raise ServeError if the spec's engine is not installed here, or cannot generate text with the model."""
    check_generates(manifest.model)
    if (check := ENGINES[spec.engine].check) is not None:
        resolve_name(check)(manifest.model, spec)


def check_predicts(model: ModelSpec) -> None:
    """Raise ServeError if a model is not a decoder, and so does not predict next tokens."""
    family = model.family
    if not family.predicts_next_token:
        reason = f"it is {family.title}, which does not predict next tokens"
        raise ServeError("the model", reason, f"ask it for {family.answers} with `mhmoe serve deploy`")


def check_generates(model: ModelSpec) -> None:
    """Raise ServeError if a model is not a decoder, or its router needs a text's domain, which prompts lack."""
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
    """Start the spec's engine with a checkpoint whose weights were verified; see `StartEngine` for the errors."""
    check_engine(manifest, spec)
    start: StartEngine = resolve_name(ENGINES[spec.engine].start)
    return start(checkpoint, manifest, *token_limits(tokenizer, manifest.ends), spec)


def token_limits(tokenizer: Tokenizer, ends: Iterable[int]) -> tuple[frozenset[int], int]:
    """Return the token ids that end an answer, and the number of ids, from 0, that may be sampled."""
    # The model may have logits for more ids than the tokenizer has tokens, and the engine must not sample an id that
    # has no text.
    return boundaries(tokenizer).ends.union(ends), token_count(tokenizer)


def load_served(checkpoint: Location, spec: ServeSpec) -> ServedModel:
    """Load a checkpoint of any kind of model, and return the model with its started engine.

    A missing or damaged file is a CheckpointError or DataError; an engine that is missing or cannot compute the model,
    or an invalid chat template, is a ServeError.
    """
    manifest = read_manifest(checkpoint, parts=("weights",))
    check_served(manifest, spec, RunDir.of_checkpoint(checkpoint))
    _use_one_thread()
    return serving_of(manifest.model.kind).load(checkpoint, spec, manifest)


def load_answerer(checkpoint: Location, spec: ServeSpec, manifest: CheckpointManifest | None = None) -> Answerer:
    """Start the spec's engine, and return it with tokenizer and chat template; see `load_served` for the errors.

    Without a manifest of just verified weights, the weights are hashed first.
    """
    _use_one_thread()
    manifest = manifest or read_manifest(checkpoint, parts=("weights",))
    tokenizer = load_run_tokenizer(checkpoint, manifest)
    run = RunDir.of_checkpoint(checkpoint)
    template = load_chat_template(run, tokenizer)
    details = ModelDetails.from_spec(f"{run.id}/{checkpoint.name}", manifest.model, manifest.weights_sha256)
    engine = load_engine(checkpoint, manifest, tokenizer, spec)
    return Answerer(engine, tokenizer, template, details, manifest.adds_start)


def load_adapters(served: ServedModel, checkpoints: Mapping[str, Location]) -> None:
    """Call `Engine.set_adapters` of a served decoder, from a thread beside the engine's."""
    assert isinstance(served, Answerer), "`check_served` refuses adapters of other models"
    _use_one_thread()
    served.engine.set_adapters(checkpoints)


def _use_one_thread() -> None:
    """Limit the calling thread to itself: OpenMP threads that it started would slow down those of the engine."""
    # The import is here because a process that only checks whether an engine can serve a model needs no torch.
    import torch

    torch.set_num_threads(1)
