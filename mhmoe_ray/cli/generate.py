"""`mhmoe generate`: let a checkpoint continue a prompt, without a server."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mhmoe_ray.cli.common import (
    STORAGE,
    CheckpointOption,
    JsonOption,
    RunArg,
    StorageOption,
    pick_checkpoint,
    print_json,
)

if TYPE_CHECKING:
    from mhmoe_ray.serve.answer import Answerer, AnswerPiece
    from mhmoe_ray.serve.engine import Request


def generate(
    run: RunArg = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; read from standard input by default.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer, at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the most likely token each time.")] = 1.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens of this total probability.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal answers.")] = None,
    gpus: Annotated[int, typer.Option(min=0, max=1, help="GPUs of this machine to compute on.")] = 0,
    checkpoint: CheckpointOption = None,
    storage: StorageOption = STORAGE,
    json: JsonOption = False,
) -> None:
    """Let a checkpoint of a run continue a prompt, in this process; the answer is printed as it is generated."""
    import asyncio
    import os

    from mhmoe_ray.errors import ServeError
    from mhmoe_ray.runs.directory import find_run
    from mhmoe_ray.serve.engine import EngineError, Request, SamplingParams
    from mhmoe_ray.serve.load import load_answerer
    from mhmoe_ray.spec import ServeSpec

    if not top_p:
        raise typer.BadParameter("--top-p 0: nothing is left to draw from; give more than 0")
    try:
        text = sys.stdin.read() if prompt is None else prompt
        # This call raises an error for an argument that is not UTF-8: Python decodes its bytes to lone surrogates,
        # which cannot be encoded.
        text.encode()
    except UnicodeError as e:
        raise ServeError("the prompt", "it is not UTF-8", "give it as UTF-8") from e
    run_dir = find_run(run, storage)
    path, manifest = pick_checkpoint(run_dir, checkpoint, verify_hashes=True)
    # This call raises an error if there is no GPU, before the checkpoint is loaded, which may take long.
    if gpus:
        _require_gpu()
    spec = ServeSpec(max_concurrency=1, cpus_per_replica=os.cpu_count() or 1, gpus_per_replica=gpus)
    answerer = load_answerer(path, spec, manifest)
    try:
        ids = answerer.encode(text)
        answerer.check_length(ids, has_answer=True)
        sampling = SamplingParams(max_tokens, temperature, top_p=top_p, seed=seed)
        pieces = asyncio.run(_collect_pieces(answerer, Request(tuple(ids), sampling), echo=not json))
    except EngineError as e:
        raise ServeError("the engine", str(e), "try another checkpoint, or --gpus 0") from e
    finally:
        # The engine is closed here also after an error, because it must be closed before the process ends (see
        # `Engine.close`).
        answerer.engine.close()
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


async def _collect_pieces(answerer: "Answerer", request: "Request", echo: bool) -> "list[AnswerPiece]":
    """Return all pieces of the answer to a request; with `echo`, also print each one as soon as it is generated."""
    pieces = []
    async for piece in answerer.answer(request):
        pieces.append(piece)
        if echo:
            print(piece.text, end="", flush=True)
    return pieces
