"""The pace of a stream's chunks, by the clock of the event loop, which here goes on as tokens come."""

import asyncio

import pytest
from pydantic import BaseModel

from mhmoe_ray.serve.answer import Piece
from mhmoe_ray.serve.api.access import Client
from mhmoe_ray.serve.api.stream import CHUNK_SECONDS, LONGEST_SECONDS, Answers, Pace

TOKEN_SECONDS = 0.01
TOKENS = 101


class Chunk(BaseModel):
    text: str
    at: float


def chunks_of(pace: Pace, choices: int = 1, ended: int = 0) -> list[Chunk]:
    """Return the chunks of the first choice of an answer with a token every 10 ms, with the times at which they came.

    The last `ended` choices of the answer have only one token each.
    """

    async def run() -> list[Chunk]:
        loop, now = asyncio.get_running_loop(), [0.0]
        loop.time = lambda: now[0]

        async def answer(own):
            tokens = 1 if own >= choices - ended else TOKENS
            for number in range(1, tokens + 1):
                if own == 0:
                    now[0] += TOKEN_SECONDS
                yield Piece("a" if own == 0 else "b", number, (), "length" if number == tokens else None)
                for _ in range(5):  # so that whoever waits for it has it
                    await asyncio.sleep(0)

        answers = Answers([answer(own) for own in range(choices)], 1, Client(""), timeout=600.0, pace=pace)
        events = await answers.events(lambda _, piece: Chunk(text=piece.text, at=now[0]), None)
        told = [event.removeprefix("data: ").strip() async for event in events]
        assert told[-1] == "[DONE]"
        chunks = [Chunk.model_validate_json(event) for event in told[:-1]]
        assert sum(len(chunk.text) for chunk in chunks) == TOKENS * (choices - ended) + ended, "none is lost"
        return [chunk for chunk in chunks if "a" in chunk.text]

    return asyncio.run(run())


def between(chunks: list[Chunk]) -> float:
    """Return the mean seconds between chunks.

    The first chunk comes before others have begun, and the last one with the answer's end, so neither counts.
    """
    times = [chunk.at for chunk in chunks[1:-1]]
    return (times[-1] - times[0]) / (len(times) - 1)


def with_others(pace: Pace, others: int) -> Pace:
    """Register this number of further streams with the pace, and return it."""
    for other in range(others):
        pace.goes_on(other)
    return pace


def test_without_an_interval_each_token_has_a_chunk():
    assert [chunk.text for chunk in chunks_of(with_others(Pace(0.0), 100))] == ["a"] * TOKENS


def test_tokens_wait_for_each_other():
    chunks = chunks_of(Pace(0.05))
    assert chunks[0] == Chunk(text="a", at=TOKEN_SECONDS), "the first comes at once"
    assert between(chunks) == pytest.approx(0.05, abs=TOKEN_SECONDS)


@pytest.mark.parametrize(("others", "seconds"), [(1, 0.05), (29, 30 * CHUNK_SECONDS), (999, LONGEST_SECONDS)])
def test_of_many_streams_all_chunks_together_are_so_many_a_second(others, seconds):
    assert between(chunks_of(with_others(Pace(0.05), others))) == pytest.approx(seconds, abs=TOKEN_SECONDS)


def test_each_choice_is_a_stream_until_it_ends():
    pace = Pace(1e-9)
    assert between(chunks_of(pace, choices=30)) == pytest.approx(30 * CHUNK_SECONDS, abs=TOKEN_SECONDS)
    assert pace.interval == 1e-9
    assert between(chunks_of(pace, choices=30, ended=29)) == pytest.approx(TOKEN_SECONDS, abs=TOKEN_SECONDS / 2)


def test_a_stream_counts_neither_while_it_waits_for_its_turn_nor_when_it_was_left():
    pace = Pace(1e-9)

    async def run():
        turn = asyncio.Event()

        async def answer():
            await turn.wait()
            while True:
                yield Piece("a", 1, ())
                await asyncio.sleep(0)

        answers = Answers([answer()], 1, Client(""), timeout=600.0, pace=pace)
        begun = asyncio.create_task(answers.events(lambda _, piece: Chunk(text=piece.text, at=0.0), None))
        await asyncio.sleep(0.01)
        assert pace.interval == 1e-9
        turn.set()
        events = await begun
        await anext(events)
        assert pace.interval == CHUNK_SECONDS
        await events.aclose()

    asyncio.run(run())
    assert pace.interval == 1e-9
