"""Tests of the interval between a stream's chunks, on an event loop whose clock advances by 10 ms with each token."""

import asyncio

import pytest
from pydantic import BaseModel

from mhmoe_ray.serving.answer import AnswerPiece
from mhmoe_ray.serving.api.access import Client
from mhmoe_ray.serving.api.stream import CHUNK_SECONDS, MAX_DELAY_SECONDS, Answers, StreamPacer
from mhmoe_ray.serving.engine import ServedWeights

TOKEN_SECONDS = 0.01
TOKENS = 101

WEIGHTS = ServedWeights("run-abc123", 1, "")


class Chunk(BaseModel):
    """Chunk of a stream: its text, and the time at which it was made."""

    text: str
    time: float


def stream_chunks(pacer: StreamPacer, choices: int = 1, short_choices: int = 0) -> list[Chunk]:
    """Stream an answer with a token every 10 ms through the pacer, and return the chunks of its first choice.

    The last `short_choices` choices of the answer have only one token each.
    """

    async def run() -> list[Chunk]:
        loop, clock_time = asyncio.get_running_loop(), [0.0]
        loop.time = lambda: clock_time[0]

        async def answer(choice):
            tokens = 1 if choice >= choices - short_choices else TOKENS
            for number in range(1, tokens + 1):
                if choice == 0:
                    clock_time[0] += TOKEN_SECONDS
                yield AnswerPiece("a" if choice == 0 else "b", number, (), "length" if number == tokens else None)
                for _ in range(5):  # let the stream take the piece before time goes on
                    await asyncio.sleep(0)

        answers = Answers(
            [answer(choice) for choice in range(choices)], 1, Client(""), timeout=600.0, pacer=pacer, weights=WEIGHTS
        )
        events = await answers.events(lambda _, piece: Chunk(text=piece.text, time=clock_time[0]), None)
        event_bodies = [event.removeprefix("data: ").strip() async for event in events]
        assert event_bodies[-1] == "[DONE]"
        chunks = [Chunk.model_validate_json(event) for event in event_bodies[:-1]]
        assert sum(len(chunk.text) for chunk in chunks) == TOKENS * (choices - short_choices) + short_choices, (
            "no token is lost"
        )
        return [chunk for chunk in chunks if "a" in chunk.text]

    return asyncio.run(run())


def mean_interval(chunks: list[Chunk]) -> float:
    """Return the mean seconds between chunks.

    The first chunk comes before other streams start, and the last one with the answer's end, so neither counts.
    """
    times = [chunk.time for chunk in chunks[1:-1]]
    return (times[-1] - times[0]) / (len(times) - 1)


def add_streams(pacer: StreamPacer, count: int) -> StreamPacer:
    """Register `count` further streams with the pacer, and return it."""
    for stream in range(count):
        pacer.record_token(stream)
    return pacer


def test_zero_interval_sends_each_token_at_once():
    assert [chunk.text for chunk in stream_chunks(add_streams(StreamPacer(0.0), 100))] == ["a"] * TOKENS


def test_tokens_are_collected_during_the_interval():
    chunks = stream_chunks(StreamPacer(0.05))
    assert chunks[0] == Chunk(text="a", time=TOKEN_SECONDS), "the first token is sent at once"
    assert mean_interval(chunks) == pytest.approx(0.05, abs=TOKEN_SECONDS)


@pytest.mark.parametrize(("stream_count", "seconds"), [(1, 0.05), (29, 30 * CHUNK_SECONDS), (999, MAX_DELAY_SECONDS)])
def test_interval_grows_with_the_number_of_streams(stream_count, seconds):
    assert mean_interval(stream_chunks(add_streams(StreamPacer(0.05), stream_count))) == pytest.approx(
        seconds, abs=TOKEN_SECONDS
    )


def test_each_choice_counts_as_a_stream_until_it_ends():
    pacer = StreamPacer(1e-9)
    assert mean_interval(stream_chunks(pacer, choices=30)) == pytest.approx(30 * CHUNK_SECONDS, abs=TOKEN_SECONDS)
    assert pacer.interval == 1e-9
    assert mean_interval(stream_chunks(pacer, choices=30, short_choices=29)) == pytest.approx(
        TOKEN_SECONDS, abs=TOKEN_SECONDS / 2
    )


def test_waiting_and_closed_streams_do_not_count():
    pacer = StreamPacer(1e-9)

    async def run():
        turn = asyncio.Event()

        async def answer():
            await turn.wait()
            while True:
                yield AnswerPiece("a", 1, ())
                await asyncio.sleep(0)

        answers = Answers([answer()], 1, Client(""), timeout=600.0, pacer=pacer, weights=WEIGHTS)
        events_task = asyncio.create_task(answers.events(lambda _, piece: Chunk(text=piece.text, time=0.0), None))
        await asyncio.sleep(0.01)
        assert pacer.interval == 1e-9
        turn.set()
        events = await events_task
        await anext(events)
        assert pacer.interval == CHUNK_SECONDS
        await events.aclose()

    asyncio.run(run())
    assert pacer.interval == 1e-9
