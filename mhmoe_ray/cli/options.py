"""Arguments and options that several commands have, and their completion.

After `mhmoe --install-completion`, the shell completes run ids and spec keys.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from types import NoneType
from typing import Annotated, Any

import typer

from mhmoe_ray.api.defaults import EVALUATION_SAMPLES, Prior
from mhmoe_ray.api.defaults import STORAGE as STORAGE
from mhmoe_ray.serving.sampling_fields import MAX_TEMPERATURE, SAMPLING_FIELDS


def complete_runs(incomplete: str) -> list[str]:
    """Return the ids of runs that start with `incomplete`, newest first, from the storage folder that commands use."""
    from mhmoe_ray.errors import MhmoeError
    from mhmoe_ray.runs.directory import list_runs
    from mhmoe_ray.storage import default_storage

    try:
        run_ids = [run.id for run in list_runs(default_storage())]
    except MhmoeError:
        # A shell cannot show an error while it completes a word, so there are no suggestions instead.
        return []
    return [name for name in reversed(run_ids) if name.startswith(incomplete)]


def complete_keys(incomplete: str) -> list[str]:
    """Return the keys of a spec that start with `incomplete`, with =, shorthands first."""
    from mhmoe_ray.planner.resolve import Shorthands
    from mhmoe_ray.spec import RunSpec

    return [key for section in (Shorthands, RunSpec) for key in _section_keys(section) if key.startswith(incomplete)]


def _section_keys(model: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a section, such as `train.steps=`; `prefix` is its path with a dot."""
    for name, field in model.model_fields.items():
        subsection = _section_model(field.annotation)
        # A range has the keys `min` and `max`, but counts as one key, because a spec may write it as one number.
        if subsection is not None and set(subsection.model_fields) != {"min", "max"}:
            yield from _section_keys(subsection, f"{prefix}{name}.")
        else:
            yield f"{prefix}{field.alias or name}="


def _section_model(annotation: Any) -> Any:
    """Return the pydantic model of a field that is a section with fixed keys; None for other fields."""
    from types import UnionType
    from typing import Union, get_args, get_origin

    from pydantic import BaseModel

    if get_origin(annotation) in (Union, UnionType):
        members = [a for a in get_args(annotation) if a is not NoneType]
        annotation = members[0] if len(members) == 1 else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def with_storage(overrides: list[str], storage: str | None) -> list[str]:
    """Return overrides of a spec with the folder of --storage, if it is given."""
    from mhmoe_ray.api.spec import override_list

    return overrides if storage is None else [*overrides, *override_list({"storage": storage})]


SpecArg = Annotated[Path, typer.Argument(help="A spec, such as `mhmoe init` writes.", show_default=False)]
RunArg = Annotated[
    str | None,
    typer.Argument(
        help="A run's id, the start of one, or its path; the newest by default. RUN@STEP names a checkpoint too.",
        autocompletion=complete_runs,
    ),
]
SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the spec.", autocompletion=complete_keys),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help="A Ray cluster: its dashboard, http://host:8265, or its name. By default RAY_API_SERVER_ADDRESS, else "
        "RAY_ADDRESS where that is a URL, else the one of `mhmoe cluster use`, else one on this machine."
    ),
]
StorageOption = Annotated[
    str, typer.Option(help="Folder that holds run directories; a path or s3://, gs://.", envvar="MHMOE_STORAGE")
]
SpecStorageOption = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="Folder that holds run directories; by default the spec's storage, else MHMOE_STORAGE, else runs.",
    ),
]
CheckpointOption = Annotated[
    str | None, typer.Option(help="Name or step of one of the run's checkpoints; newest by default.")
]
ForceOption = Annotated[
    bool,
    typer.Option("--force", help="Proceed even if a cluster does not answer that may still train or serve the run."),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-run",
        help="Use cluster.runtime_env and serve.host, keys, cors_origins and vllm of a run that you did not submit.",
    ),
]
DetachOption = Annotated[bool, typer.Option("--detach", help="Do not follow the job; it goes on by itself.")]
TextOption = Annotated[
    list[str], typer.Option("--text", help="Raw text instead of the held-out samples: a folder, file or pattern.")
]
AgainOption = Annotated[
    bool, typer.Option("--again", help="Evaluate even if the run directory holds the result already.")
]
SamplesOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=f"Samples of each domain of --text, at most; {EVALUATION_SAMPLES} by default. Of images, different "
        "images.",
    ),
]
TextSetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Set a data key of a spec, by which --text is read.")
]
GpusOption = Annotated[
    int | None,
    typer.Option(min=0, max=1, help="GPUs to compute on; by default as many as a worker of the training had."),
]
ModelGpusOption = Annotated[
    int, typer.Option(min=0, max=1, help="GPUs of this machine to compute on, if no cluster computes.")
]
PriorOption = Annotated[
    Prior | None,
    typer.Option(
        help="With router domain: let all experts predict together, with these prior probabilities of the domains. By "
        "default the domain of each text is known."
    ),
]


def takes_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with options for all sampling parameters but `logprobs` in place of its argument `sampling`."""
    sampling_options = {name: _sampling_option(name) for name in SAMPLING_FIELDS if name != "logprobs"}
    own_options = [option for name, option in inspect.signature(command).parameters.items() if name != "sampling"]

    @wraps(command)
    def run(*args: Any, **values: Any) -> None:
        from mhmoe_ray.api.generation import checked_sampling

        sampling = {name: values.pop(name, option.default) for name, option in sampling_options.items()}
        if not sampling["top_p"]:
            raise typer.BadParameter("--top-p 0: nothing is left to draw from; give more than 0")
        if not all(sampling["stop"]):
            raise typer.BadParameter("--stop '': an empty text would end every answer at once; leave it out")
        biases = dict(map(_parse_bias, sampling["logit_bias"]))
        command(checked_sampling(**sampling | {"logit_bias": biases}), *args, **values)

    parameters = [*own_options[:2], *sampling_options.values(), *own_options[2:]]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # Typer reads it
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _sampling_option(name: str) -> inspect.Parameter:
    """Return the option for a sampling parameter, with its type, range and text."""
    field = SAMPLING_FIELDS[name]
    kind = {NoneType: int | None, list: list[str], dict: list[str]}.get(type(field.default), type(field.default))
    # The name is given, because Typer would add `--no-...` to an option without a value. Typer has no limits that are
    # themselves excluded, so `takes_sampling` refuses 0 as --top-p.
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        help=field.text,
        min=field.limits.get("ge", field.limits.get("gt")),
        max=MAX_TEMPERATURE if name == "temperature" else field.limits.get("le"),
        metavar="TOKEN=BIAS" if name == "logit_bias" else None,
    )
    default = [] if kind == list[str] else field.default
    return inspect.Parameter(
        name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=Annotated[kind, option]
    )


def _parse_bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as e:
        raise typer.BadParameter(f"--logit-bias {text}: give a token id and an amount, such as 17=-100") from e
