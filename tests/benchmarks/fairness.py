"""Short requests of a client beside many long ones of another client, in one engine."""

import asyncio
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

from mhmoe_ray.bench.serve.model import VOCAB_SIZE, plain_model, write_model
from mhmoe_ray.cli.formats import format_seconds
from mhmoe_ray.serving.engine import Engine, Request, SamplingParams
from mhmoe_ray.serving.load import load_answerer
from tests.benchmarks.harness import Results

LONG, SHORT = (300, 400), (20, 32)
"""Numbers of tokens of prompts and answers."""
SEQ_LEN = 1024


async def _answer(engine: Engine, client: str, size: tuple[int, int], seed: int) -> float:
    """Send a request with a random prompt, and return the seconds until its answer is complete."""
    prompt_ids = random.Random(seed).choices(range(1, VOCAB_SIZE), k=size[0])
    sampling = SamplingParams(max_tokens=size[1], temperature=0, ignore_eos=True)
    start = time.perf_counter()
    async for _ in engine.generate(Request(tuple(prompt_ids), sampling, client=client)):
        pass
    return time.perf_counter() - start


async def _time_short(engine: Engine, is_together: bool, seed: int) -> list[float]:
    answers = [_answer(engine, "short", SHORT, seed + number) for number in range(5)]
    return list(await asyncio.gather(*answers)) if is_together else [await answer for answer in answers]


async def _measure_round(engine: Engine, seed: int) -> dict[str, list[float]]:
    """Return the seconds of the short requests by case."""
    seconds = {}
    for name, is_together in (("one after another", False), ("together", True)):
        seconds[f"{name}, alone"] = await _time_short(engine, is_together, seed + 10)
    tasks = [asyncio.create_task(_answer(engine, "long", LONG, seed + 100 + number)) for number in range(50)]
    # The short requests come when the long ones fill the engine.
    while engine.stats().answer_tokens == 0 or engine.stats().running < 32:
        await asyncio.sleep(0.1)
    await asyncio.sleep(5)
    for name, is_together in (("one after another", False), ("together", True)):
        seconds[f"{name}, beside 50 long ones"] = await _time_short(engine, is_together, seed + 20)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    while engine.stats().running:
        await asyncio.sleep(0.1)
    return seconds


def measure(engine_name: str, rounds: int, folder: Path) -> Results:
    """Time the requests in rounds, and return the medians of all."""
    model = plain_model(d_model=384, layers=4, experts=8, top_k=2, d_expert=1024)
    served_model = write_model(model, SEQ_LEN, folder / "model", "float32", threads=2, max_requests=32)
    engine = load_answerer(served_model.checkpoint, served_model.serve_spec(engine_name)).engine
    seconds: dict[str, list[float]] = {}
    try:
        asyncio.run(_answer(engine, "short", SHORT, 0))
        for number in range(rounds):
            for name, values in asyncio.run(_measure_round(engine, 1000 * number)).items():
                seconds.setdefault(name, []).extend(values)
    finally:
        engine.close()
    medians = {name: median(values) for name, values in seconds.items()}
    rows, figures = [], dict[str, Any](engine=engine_name, median_seconds=medians)
    for name, value in medians.items():
        case, _, load = name.partition(", ")
        figures[f"ratio {name}"] = ratio = value / medians[f"{case}, alone"]
        rows.append([case, load, format_seconds(value), f"{ratio:.2f}"])
    return Results(f"Five short requests, engine {engine_name}", ["requests", "", "median", "ratio"], rows, figures)
