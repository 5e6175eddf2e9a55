"""`mhmoe generate`: let a checkpoint continue a prompt in this process, or the prompts of a file on a cluster.

This module has the command and answers a single prompt; generate_batch.py answers files of prompts.
"""

import sys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhmoe_ray.cli.options import (
    STORAGE,
    AddressOption,
    CheckpointOption,
    DetachOption,
    JsonOption,
    RunArg,
    StorageOption,
    TrustOption,
)
from mhmoe_ray.cli.output import activity_lines, print_json, print_note, show_activity
from mhmoe_ray.serving.sampling_fields import MAX_LOGPROBS, MAX_TEMPERATURE, SAMPLING_FIELDS
from mhmoe_ray.terminal import printable

if TYPE_CHECKING:
    from mhmoe_ray.serving.sampling import SamplingParams

DEFAULTS = {name: field.default for name, field in SAMPLING_FIELDS.items()}


def _sampling_option(name: str, note: str = "", **settings: Any) -> Any:
    """Return the option for a sampling parameter, with its range and text."""
    field = SAMPLING_FIELDS[name]
    limits = field.limits
    # Typer has no limits that are themselves excluded; 0 as --top-p is refused later.
    settings = {"min": limits.get("ge", limits.get("gt")), "max": limits.get("le"), **settings}
    # The name is given, because Typer would add `--no-...` to an option without a value.
    return typer.Option(f"--{name.replace('_', '-')}", help=f"{field.text}{note}", **settings)


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


def generate(
    run: RunArg = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; read from standard input by default.")] = None,
    max_tokens: Annotated[int, _sampling_option("max_tokens")] = DEFAULTS["max_tokens"],
    temperature: Annotated[float, _sampling_option("temperature", max=MAX_TEMPERATURE)] = DEFAULTS["temperature"],
    top_p: Annotated[float, _sampling_option("top_p")] = DEFAULTS["top_p"],
    top_k: Annotated[int, _sampling_option("top_k")] = DEFAULTS["top_k"],
    min_p: Annotated[float, _sampling_option("min_p")] = DEFAULTS["min_p"],
    presence_penalty: Annotated[float, _sampling_option("presence_penalty")] = DEFAULTS["presence_penalty"],
    frequency_penalty: Annotated[float, _sampling_option("frequency_penalty")] = DEFAULTS["frequency_penalty"],
    repetition_penalty: Annotated[float, _sampling_option("repetition_penalty")] = DEFAULTS["repetition_penalty"],
    min_tokens: Annotated[int, _sampling_option("min_tokens")] = DEFAULTS["min_tokens"],
    ignore_eos: Annotated[bool, _sampling_option("ignore_eos")] = DEFAULTS["ignore_eos"],
    logit_bias: Annotated[list[str], _sampling_option("logit_bias", metavar="TOKEN=BIAS")] = [],  # noqa: B006 - typer needs the list
    seed: Annotated[int | None, _sampling_option("seed")] = DEFAULTS["seed"],
    stop: Annotated[list[str], _sampling_option("stop")] = DEFAULTS["stop"],
    logprobs: Annotated[
        int | None, _sampling_option("logprobs", note=" Only with --input.", min=0, max=MAX_LOGPROBS)
    ] = DEFAULTS["logprobs"],
    gpus: Annotated[int, typer.Option(min=0, max=1, help="GPUs of this machine to compute a single prompt on.")] = 0,
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
    from mhmoe_ray.api.generation import checked_sampling
    from mhmoe_ray.checkpoint.find import split_step

    if not top_p:
        raise typer.BadParameter("--top-p 0: nothing is left to draw from; give more than 0")
    if not all(stop):
        raise typer.BadParameter("--stop '': an empty text would end every answer at once; leave it out")
    sampling = checked_sampling(
        **{name: arguments[name] for name in SAMPLING_FIELDS} | {"logit_bias": dict(map(_parse_bias, logit_bias))}
    )
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


def _parse_bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as e:
        raise typer.BadParameter(f"--logit-bias {text}: give a token id and an amount, such as 17=-100") from e


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
    import os

    from mhmoe_ray.api.checkpoints import pick_checkpoint
    from mhmoe_ray.api.model import LoadedModel
    from mhmoe_ray.api.model_source import checkpoint_source
    from mhmoe_ray.errors import ServeError
    from mhmoe_ray.runs.directory import find_run

    if prompt is None:
        activity_lines.end()
    if prompt is None and sys.stdin.isatty():
        print_note("type the prompt, and end it with Ctrl-D")
    try:
        text = sys.stdin.read() if prompt is None else prompt
        # This call raises an error for an argument that is not UTF-8: Python decodes its bytes to lone surrogates,
        # which cannot be encoded.
        text.encode()
    except UnicodeError as e:
        raise ServeError("the prompt", "it is not UTF-8", "give it as UTF-8") from e
    show_activity("verifying the checkpoint")
    run_dir = find_run(run, storage)
    path, manifest = pick_checkpoint(run_dir, checkpoint, verify_hashes=True, on_note=print_note)
    # This call raises an error if there is no GPU, before the checkpoint is loaded, which may take long.
    if gpus:
        _require_gpu()
    show_activity(f"loading {path.name} of {run_dir.id}")
    pieces, has_terminal = [], sys.stdout.isatty()
    with LoadedModel(checkpoint_source(path, manifest), "cuda" if gpus else "cpu", os.cpu_count()) as model:
        show_activity("generating the answer")
        for piece in model.stream(text, **sampling.model_dump()):
            pieces.append(piece)
            if not json:
                if has_terminal:
                    activity_lines.end()
                print(printable(piece.text) if has_terminal else piece.text, end="", flush=True)
    if json:
        print_json(
            {
                "run": run_dir.id,
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


def _require_gpu() -> None:
    import torch

    from mhmoe_ray.errors import ServeError

    if not torch.cuda.is_available():
        raise ServeError("--gpus 1", "torch finds no GPU in this process", "give --gpus 0, or install torch for CUDA")
