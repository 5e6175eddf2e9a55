"""Loading of a checkpoint to answer requests: engine, tokenizer and chat template.

The engines are in the table `ENGINES` of `spec/serve.py`. The library that an engine computes with is imported only
when that engine is loaded. A process that only checks whether a model can be served does not need the library.
"""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Protocol

from tokenizers import Tokenizer

from mhmoe_ray.checkpoint.manifest import CheckpointManifest, read_manifest
from mhmoe_ray.checkpoint.run_files import load_run_classes
from mhmoe_ray.checkpoint.tokenizer import load_run_tokenizer
from mhmoe_ray.data.tokenizer import boundaries, token_count
from mhmoe_ray.errors import ServeError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serving.answer import Answerer, ModelDetails, load_chat_template
from mhmoe_ray.serving.engine import Engine
from mhmoe_ray.spec import EncoderSpec, ModelSpec, ServeSpec, VisionSpec
from mhmoe_ray.spec.serve import ENGINES
from mhmoe_ray.storage import Location

if TYPE_CHECKING:
    from mhmoe_ray.serving.encoder.answer import EncoderAnswerer
    from mhmoe_ray.serving.vision.answer import VisionAnswerer


def check_served(manifest: CheckpointManifest, spec: ServeSpec, run: RunDir) -> None:
    """Check that a model of any kind can be served here, without starting the engine.

    Args:
        manifest: the checkpoint's manifest.
        spec: section `serve` of a spec, which names the engine.
        run: directory of the run that wrote the checkpoint.

    Raises:
        ServeError: the engine or a package is not installed, or the engine cannot compute this model.
    """
    if manifest.model.vision is not None:
        check_vision(manifest.model.vision, spec)
    elif manifest.model.encoder is not None:
        check_encoder(manifest.model.encoder, spec, run)
    else:
        check_engine(manifest, spec)


def check_engine(manifest: CheckpointManifest, spec: ServeSpec) -> None:
    """Check that the spec's engine is installed here and can generate text with the model, without starting it.

    Raises:
        ServeError: the engine is not installed, or cannot compute this model.
    """
    check_generates(manifest.model)
    if (check := ENGINES[spec.engine].check) is not None:
        resolve_name(check)(manifest.model, spec)


def check_encoder(encoder: EncoderSpec, spec: ServeSpec, run: RunDir) -> None:
    """Check that an encoder can be served here.

    Raises:
        ServeError: the encoder was trained neither to match images with texts nor to write captions, the package for
            images is not installed, or the spec names another engine than torch.
    """
    _require_torch_engine(spec, "an encoder")
    if encoder.d_match is None and not writes_captions(run):
        reason = "it was trained neither to match images with texts nor to write captions"
        fix = "fine-tune it with a part of objective contrastive or caption (`start.from`)"
        raise ServeError("the model", reason, fix)
    _require_packages({"PIL": "pillow"}, "pictures")


def check_vision(vision: VisionSpec, spec: ServeSpec) -> None:
    """Raise ServeError if a package for a vision model is missing here, or the spec names another engine than torch."""
    _require_torch_engine(spec, "a vision model")
    has_detector = any(task.detector is not None for task in vision.tasks.values())
    _require_packages({"PIL": "pillow"} | ({"torchvision": "torchvision"} if has_detector else {}), "vision")


def _require_packages(packages: Mapping[str, str], extra: str) -> None:
    """Raise ServeError if a Python package is not installed.

    Args:
        packages: names of packages, as pip takes them, by the names of their modules.
        extra: extra of this project that installs all of them.
    """
    for module, package in packages.items():
        if find_spec(module) is None:
            reason = f"it needs the package {package}, which is missing"
            raise ServeError("the model", reason, f"pip install 'mhmoe-ray[{extra}]' where replicas run")


def _require_torch_engine(spec: ServeSpec, kind: str) -> None:
    if spec.engine != "torch":
        raise ServeError(f"engine {spec.engine}", f"it computes decoders, and this is {kind}", "set serve.engine=torch")


def writes_captions(run: RunDir) -> bool:
    """Return whether a run trains an encoder to write captions."""
    return any(part.traits.writes for part in run.spec().parts)


def check_predicts(model: ModelSpec) -> None:
    """Raise ServeError if a model is not a decoder, and therefore does not predict next tokens."""
    if model.vision is not None:
        reason = "it is a vision model, which does not predict next tokens"
        raise ServeError("the model", reason, "ask it for classes and objects with `mhmoe serve deploy`")
    if model.encoder is not None:
        reason = "it is an encoder, which does not predict next tokens"
        raise ServeError("the model", reason, "ask it for vectors and captions with `mhmoe serve deploy`")


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


def load_served(checkpoint: Location, spec: ServeSpec) -> "Answerer | EncoderAnswerer | VisionAnswerer":
    """Load a checkpoint of a decoder, an encoder or a vision model, and return the model with its started engine.

    Args:
        checkpoint: a checkpoint directory inside its run directory.
        spec: engine, precision, and limits on numbers of requests.

    Raises:
        CheckpointError, DataError: the checkpoint, or the run's tokenizer or list of classes, is missing or damaged.
        ServeError: the engine is not installed, or cannot compute this model, or the run's chat template is invalid.
    """
    manifest = read_manifest(checkpoint, parts=("weights",))
    if manifest.model.vision is not None:
        return load_vision(checkpoint, spec, manifest)
    if manifest.model.encoder is not None:
        return load_encoder(checkpoint, spec, manifest)
    return load_answerer(checkpoint, spec, manifest)


def load_vision(checkpoint: Location, spec: ServeSpec, manifest: CheckpointManifest) -> "VisionAnswerer":
    """Start the engine for a checkpoint of a vision model; for the arguments and errors see `load_served`."""
    import torch

    from mhmoe_ray.checkpoint.load import load_verified_vision
    from mhmoe_ray.serving.vision.answer import VisionAnswerer
    from mhmoe_ray.serving.vision.engine import VisionEngine

    torch.set_num_threads(1)
    vision = manifest.model.vision
    assert vision is not None
    check_vision(vision, spec)
    class_names = load_run_classes(checkpoint, manifest)
    model = load_verified_vision(checkpoint, manifest)
    if spec.gpus_per_replica:
        model.to("cuda")
    details = ModelDetails.from_spec(f"{RunDir.of_checkpoint(checkpoint).id}/{checkpoint.name}", manifest.model)
    return VisionAnswerer(VisionEngine(model, spec), details, vision, class_names)


def load_encoder(checkpoint: Location, spec: ServeSpec, manifest: CheckpointManifest) -> "EncoderAnswerer":
    """Start the engine for a checkpoint of an encoder; for the arguments and errors see `load_served`."""
    import torch

    from mhmoe_ray.checkpoint.load import load_verified_encoder
    from mhmoe_ray.serving.encoder.answer import EncoderAnswerer
    from mhmoe_ray.serving.encoder.engine import EncoderEngine
    from mhmoe_ray.serving.encoder.names import held_out_names

    torch.set_num_threads(1)
    run, encoder = RunDir.of_checkpoint(checkpoint), manifest.model.encoder
    assert encoder is not None
    check_encoder(encoder, spec, run)
    tokenizer = load_run_tokenizer(checkpoint, manifest)
    model = load_verified_encoder(checkpoint, manifest)
    if spec.gpus_per_replica:
        model.to("cuda")
    details = ModelDetails.from_spec(f"{run.id}/{checkpoint.name}", manifest.model)
    names = held_out_names(run, manifest, tokenizer)
    engine = EncoderEngine(model, manifest.seq_len, boundaries(tokenizer).start, spec)
    return EncoderAnswerer(engine, tokenizer, details, encoder, writes_captions=writes_captions(run), names=names)


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
