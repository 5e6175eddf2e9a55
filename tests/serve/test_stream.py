"""How often a stream has a chunk, by the clock of the event loop, which here goes on as tokens come."""

import asyncio

import pytest
from pydantic import BaseModel

from mhmoe_ray.serve.answer import Piece
from mhmoe_ray.serve.http.access import Client
from mhmoe_ray.serve.http.stream import CHUNK_SECONDS, Answers, Pace

TOKEN_SECONDS = 0.01
TOKENS = 101


class Chunk(BaseModel):
    text: str
    at: float


def chunks_of(pace: Pace, choices: int = 1) -> list[Chunk]:
    """Of an answer with a token every 10 ms: what they hold, and when they came."""

    async def run() -> list[Chunk]:
        loop, now = asyncio.get_running_loop(), [0.0]
        loop.time = lambda: now[0]

        async def answer(own):
            for number in range(1, TOKENS + 1):
                if own == 0:
                    now[0] += TOKEN_SECONDS
                yield Piece("a", number, (), "length" if number == TOKENS else None)
                for _ in range(5):  # so that whoever waits for it has it
                    await asyncio.sleep(0)

        answers = Answers([answer(own) for own in range(choices)], 1, Client(""), timeout=600.0, pace=pace)
        events = await answers.events(lambda _, piece: Chunk(text=piece.text, at=now[0]), None)
        told = [event.removeprefix("data: ").strip() async for event in events]
        assert told[-1] == "[DONE]"
        return [Chunk.model_validate_json(event) for event in told[:-1]]

    return asyncio.run(run())


def between(chunks: list[Chunk]) -> float:
    """Seconds, but for the last one, which comes with the answer's end."""
    times = [chunk.at for chunk in chunks[:-1]]
    return (times[-1] - times[0]) / (len(times) - 1)


def test_without_an_interval_each_token_has_a_chunk():
    pace = Pace(0.0)
    with pace.streaming(100):
        assert [chunk.text for chunk in chunks_of(pace)] == ["a"] * TOKENS


def test_tokens_wait_for_each_other_and_none_is_lost():
    chunks = chunks_of(Pace(0.05))
    assert chunks[0] == Chunk(text="a", at=TOKEN_SECONDS), "the first comes at once"
    assert between(chunks) == pytest.approx(0.05, abs=TOKEN_SECONDS)
    assert sum(len(chunk.text) for chunk in chunks) == TOKENS


@pytest.mark.parametrize("others", [1, 9, 49])
def test_of_many_streams_all_chunks_together_are_so_many_a_second(others):
    pace = Pace(0.05)
    with pace.streaming(others):
        found = between(chunks_of(pace))
    assert found == pytest.approx(max(0.05, (others + 1) * CHUNK_SECONDS), abs=TOKEN_SECONDS)


def test_streams_count_while_they_are_open_each_choice_for_itself():
    pace = Pace(1e-9)
    assert len(chunks_of(pace, choices=30)) < 30 * TOKENS / 3
    assert pace.interval == 1e-9, "what has ended counts no more"


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
        assert pace.interval == CHUNK_SECONDS
        await events.aclose()

    asyncio.run(run())
    assert pace.interval == 1e-9
