"""`mhmoe generate`: let a checkpoint continue a prompt in this process, or the prompts of a file on a cluster.

This module has the command and answers a single prompt; generate_batch.py answers files of prompts.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated

import typer

from mhmoe_ray.cli.options import (
    STORAGE,
    AddressOption,
    CheckpointOption,
    DetachOption,
    JsonOption,
    ModelGpusOption,
    RunArg,
    StorageOption,
    TrustOption,
    takes_sampling,
)
from mhmoe_ray.cli.output import activity_lines, print_json, print_note, show_activity
from mhmoe_ray.serving.sampling_fields import MAX_LOGPROBS, SAMPLING_FIELDS
from mhmoe_ray.terminal import printable

if TYPE_CHECKING:
    from mhmoe_ray.api.model import LoadedModel
    from mhmoe_ray.checkpoint.manifest import CheckpointManifest
    from mhmoe_ray.serving.answer import AnswerPiece
    from mhmoe_ray.serving.sampling import SamplingParams
    from mhmoe_ray.storage import Location


@dataclass(frozen=True)
class BatchOptions:
    """Options of `mhmoe generate` that apply only to a file of prompts; one that is not given is None, empty or
    False."""

    input: str | None = None
    output: str | None = None
    logprobs: int | None = None
    engine: str | None = None
    workers: int | None = None
    cpus_per_worker: int | None = None
    gpus_per_worker: int | None = None
    chunk_rows: int | None = None
    set: tuple[str, ...] = ()
    address: str | None = None
    detach: bool = False
    cancel: bool = False
    trust_run: bool = False

    @property
    def is_requested(self) -> bool:
        """True if the user named a file of prompts or a folder for its answers."""
        return self.input is not None or self.output is not None

    def require_none(self) -> None:
        """Check that a command about a single prompt has none of these options."""
        for name, value in vars(self).items():
            if value not in (None, (), False):
                raise typer.BadParameter(
                    f"--{name.replace('_', '-')} is about a file of prompts: name one with --input"
                )

    @property
    def overrides(self) -> list[str]:
        """Overrides of the spec's serve section, such as `serve.engine=vllm`, to which these options translate."""
        values = {
            "engine": self.engine,
            "cpus_per_replica": self.cpus_per_worker,
            "gpus_per_replica": self.gpus_per_worker,
        }
        return [*self.set, *(f"serve.{name}={value}" for name, value in values.items() if value is not None)]


@takes_sampling
def generate(
    sampling: "SamplingParams",
    run: RunArg = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; read from standard input by default.")] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_LOGPROBS, help=f"{SAMPLING_FIELDS['logprobs'].text} Only with --input."),
    ] = None,
    gpus: ModelGpusOption = 0,
    input_: Annotated[
        str | None,
        typer.Option(
            "--input",
            help="File of prompts instead: JSON lines (.jsonl, also .gz and .zst) or .parquet, whose rows have a "
            "`prompt` or `messages`.",
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="With --input: folder of the answers; a path or s3://, gs://.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="With --input: torch or vllm; by default that of the run's serve section.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="With --input: number of workers; 1 by default.")] = None,
    cpus_per_worker: Annotated[
        int | None, typer.Option(min=1, help="With --input: by default serve.cpus_per_replica of the run.")
    ] = None,
    gpus_per_worker: Annotated[
        int | None, typer.Option(min=0, help="With --input: by default serve.gpus_per_replica of the run.")
    ] = None,
    chunk_rows: Annotated[
        int | None, typer.Option(min=1, help="With --input: rows of each file of the output; 128 by default.")
    ] = None,
    set_: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="With --input: override a key of the serve section.")
    ] = [],  # noqa: B006 - typer needs the list
    cancel: Annotated[bool, typer.Option("--cancel", help="End the job that answers into --output.")] = False,
    checkpoint: CheckpointOption = None,
    storage: StorageOption = STORAGE,
    address: AddressOption = None,
    detach: DetachOption = False,
    trust_run: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Let a checkpoint of a run continue a prompt, in this process; the answer is printed as it is generated.

    With --input and --output, a job on a cluster answers all rows of a file. The same command given again follows the
    job, or continues with what is missing. For example `mhmoe generate --input prompts.jsonl --output answers --workers
    4`.
    """
    arguments = locals()
    show_activity("loading modules")
    from mhmoe_ray.checkpoint.find import split_step

    sampling = sampling.model_copy(update={"logprobs": logprobs})
    run, checkpoint = split_step(run, checkpoint)
    renamed = {"input": input_, "set": tuple(set_)}
    options = BatchOptions(**{field.name: (arguments | renamed)[field.name] for field in fields(BatchOptions)})
    if not options.is_requested:
        options.require_none()
        _answer_prompt(run, prompt, sampling, gpus, checkpoint, storage, json)
        return
    if prompt is not None:
        raise typer.BadParameter("--prompt and --input: give one of them")
    if gpus:
        raise typer.BadParameter("--gpus is about a single prompt: with --input, give --gpus-per-worker")
    # The import is here because only this case needs modules for clusters.
    from mhmoe_ray.cli.generate_batch import answer_file

    answer_file(run, checkpoint, storage, sampling, options, json)


def _answer_prompt(
    run: str | None,
    prompt: str | None,
    sampling: "SamplingParams",
    gpus: int,
    checkpoint: str | None,
    storage: str,
    json: bool,
) -> None:
    """Print the answer to a single prompt, from standard input if it is None, which is computed in this process."""
    from mhmoe_ray.runs.directory import RunDir

    if prompt is None:
        activity_lines.end()
    if prompt is None and sys.stdin.isatty():
        print_note("type the prompt, and end it with Ctrl-D")
    text = read_text(lambda: sys.stdin.read() if prompt is None else prompt)
    path, manifest, model = load_model(run, checkpoint, storage, gpus)
    pieces = []
    with model:
        show_activity("generating the answer")
        for piece in model.stream(text, **sampling.model_dump()):
            pieces.append(piece)
            if not json:
                print_piece(piece)
    if json:
        print_json(
            {
                "run": RunDir.of_checkpoint(path).id,
                "checkpoint": path.name,
                "step": manifest.step,
                "prompt": text,
                "text": "".join(piece.text for piece in pieces),
                "tokens": pieces[-1].token_count,
                "finish_reason": pieces[-1].finish_reason,
            }
        )
    else:
        print()


def read_text(read: Callable[[], str]) -> str:
    """Return the text that `read` returns; one that is not UTF-8 is a ServeError."""
    from mhmoe_ray.errors import ServeError

    try:
        text = read()
        # This call raises an error for a text that is not UTF-8: Python decodes an argument's bytes to lone surrogates,
        # which cannot be encoded.
        text.encode()
    except UnicodeError as e:
        raise ServeError("the prompt", "it is not UTF-8", "give it as UTF-8") from e
    return text


def load_model(
    run: str | None, checkpoint: str | None, storage: str, gpus: int
) -> "tuple[Location, CheckpointManifest, LoadedModel]":
    """Return the path and the manifest of a run's checkpoint, and its model, which computes in this process."""
    import os

    from mhmoe_ray.api.checkpoints import pick_checkpoint
    from mhmoe_ray.api.model import LoadedModel
    from mhmoe_ray.api.model_source import checkpoint_source
    from mhmoe_ray.runs.directory import find_run

    show_activity("verifying the checkpoint")
    run_dir = find_run(run, storage)
    path, manifest = pick_checkpoint(run_dir, checkpoint, verify_hashes=True, on_note=print_note)
    # This call raises an error if there is no GPU, before the checkpoint is loaded, which may take long.
    if gpus:
        _require_gpu()
    show_activity(f"loading {path.name} of {run_dir.id}")
    model = LoadedModel(checkpoint_source(path, manifest), "cuda" if gpus else "cpu", os.cpu_count())
    return path, manifest, model


def _require_gpu() -> None:
    import torch

    from mhmoe_ray.errors import ServeError

    if not torch.cuda.is_available():
        raise ServeError("--gpus 1", "torch finds no GPU in this process", "give --gpus 0, or install torch for CUDA")


def print_piece(piece: "AnswerPiece") -> None:
    """Print a piece of an answer at once, as the model wrote it unless a terminal would obey it."""
    has_terminal = sys.stdout.isatty()
    if has_terminal:
        activity_lines.end()
    print(printable(piece.text) if has_terminal else piece.text, end="", flush=True)
