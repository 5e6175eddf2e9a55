"""Tests of the engine of encoders: turns of clients, captions token by token, limits, statistics and failures."""

import asyncio

import numpy as np
import pytest
import torch

from mhmoe_ray.families.encoder.model.captions import write_captions
from mhmoe_ray.families.encoder.serving.engine import EncoderEngine
from mhmoe_ray.families.encoder.serving.request import EncodeRequest
from mhmoe_ray.families.images.crops import crop_pixels
from mhmoe_ray.families.images.image_urls import read_image_url
from mhmoe_ray.model.build import build_model
from mhmoe_ray.serving.engine import BusyError, EngineError
from mhmoe_ray.spec import ServeSpec
from tests.serving.asking import answer_inputs
from tests.support.served_encoder import SEQ_LEN, URLS, SteppedEngine, endless_model, make_encoder_run


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder_run(tmp_path_factory.mktemp("encoder"))


def test_requests_take_turns_in_passes_of_bounded_size(encoder):
    """A short request is answered before a long one that arrived before it."""
    _, model = encoder
    engine = EncoderEngine(model, SEQ_LEN, 0, ServeSpec(max_concurrency=2))
    text, finished = EncodeRequest(token_ids=(0, 5, 6)), []

    async def ask(name, count):
        await answer_inputs(engine, [text] * count)
        finished.append(name)

    async def ask_both():
        # The engine takes its first inputs under this lock, so it finds both requests.
        engine._condition.acquire()
        tasks = [asyncio.create_task(ask(name, count)) for name, count in (("long", 20), ("short", 1))]
        await asyncio.sleep(0)
        engine._condition.release()
        await asyncio.gather(*tasks)

    asyncio.run(ask_both())
    assert finished == ["short", "long"]
    # One pass has an input of each, and the other 19 inputs take ten passes.
    assert engine.stats().steps == 11
    engine.close()


@pytest.mark.long
def test_inputs_of_a_client_that_has_gone_away_are_not_computed(encoder):
    _, model = encoder
    engine = EncoderEngine(model, SEQ_LEN, 0, ServeSpec(max_concurrency=1))

    async def leave():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await answer_inputs(engine, [EncodeRequest(token_ids=(0, 5, 6))] * 100_000)

    asyncio.run(leave())
    stats = engine.stats()
    assert (stats.waiting, stats.requests) == (0, 1)
    assert stats.prompt_tokens < 3 * 100_000
    engine.close()


def test_clients_take_turns_whatever_the_number_of_their_requests(encoder):
    _, model = encoder
    engine, finished = SteppedEngine(model, SEQ_LEN, 0, ServeSpec(max_concurrency=1)), []

    async def ask(client, number):
        await answer_inputs(engine, [EncodeRequest(token_ids=(0, 5, 6))], client)
        finished.append((client, number))

    async def ask_all():
        requests = [("ann", 0), ("ann", 1), ("ann", 2), ("bob", 0), ("bob", 1), ("cid", 0)]
        tasks = [asyncio.create_task(ask(*request)) for request in requests]
        await asyncio.sleep(0)
        engine.allow_rounds(6)
        await asyncio.gather(*tasks)

    asyncio.run(ask_all())
    assert finished == [("ann", 0), ("bob", 0), ("cid", 0), ("ann", 1), ("bob", 1), ("ann", 2)]
    engine.close()


def caption_request(max_tokens, number=0):
    return EncodeRequest(image=crop_pixels(read_image_url(URLS[number]), 16), max_tokens=max_tokens)


@pytest.mark.parametrize(
    ("max_tokens", "token_count"), [(1, 1), (3, 3), (SEQ_LEN - 1, SEQ_LEN - 1), (500, SEQ_LEN - 1)]
)
def test_limit_of_a_caption_bounds_its_passes(encoder, max_tokens, token_count):
    model = endless_model(encoder)
    engine = EncoderEngine(model, SEQ_LEN, 0, ServeSpec())
    [encoding] = asyncio.run(answer_inputs(engine, [caption_request(max_tokens)]))
    image = torch.from_numpy(np.stack([caption_request(max_tokens).image]))
    assert [encoding.caption_ids] == write_captions(model, image, 0, token_count)
    assert encoding.finish_reason == "length"
    stats = engine.stats()
    assert (stats.steps, stats.answer_tokens) == (token_count, token_count)
    # A pass computes 17 positions of the image, the start token and the caption so far.
    assert stats.step_tokens == sum(17 + 1 + length for length in range(token_count))
    assert sum(stats.count_LE[0]) > 0
    assert stats.answer_rate == token_count / 10
    assert (stats.first_token.count, stats.each_token.count) == (1, token_count - 1)
    engine.close()


def test_a_caption_that_ends_by_itself_says_so(encoder):
    model = endless_model(encoder)
    model.output["text"].bias[0] = 1e4
    engine = EncoderEngine(model, SEQ_LEN, 0, ServeSpec())
    [encoding] = asyncio.run(answer_inputs(engine, [caption_request(1)]))
    assert (encoding.caption_ids, encoding.finish_reason) == ([], "stop")
    engine.close()


def test_other_requests_are_answered_between_the_tokens_of_a_caption(encoder):
    """Another caption joins after two tokens, and a text and an image get their vectors meanwhile."""
    model = endless_model(encoder)
    engine, finished = SteppedEngine(model, SEQ_LEN, 0, ServeSpec(max_concurrency=2)), []

    async def ask(name, value):
        [encoding] = await answer_inputs(engine, [value])
        finished.append(name)
        return encoding.caption_ids

    async def ask_all():
        tasks = [asyncio.create_task(ask("long", caption_request(8)))]
        await engine.run_rounds(2)
        other_requests = {
            "short": caption_request(2, 1),
            "text": EncodeRequest(token_ids=(0, 5, 6)),
            "image": caption_request(None, 2),
        }
        tasks += [asyncio.create_task(ask(name, value)) for name, value in other_requests.items()]
        await asyncio.sleep(0)
        engine.allow_rounds(100)
        return await asyncio.gather(*tasks)

    captions = asyncio.run(ask_all())
    assert finished[-1] == "long"
    images = torch.from_numpy(np.stack([caption_request(1, number).image for number in (0, 1)]))
    expected = write_captions(model, images, 0, 8)
    assert captions[:2] == [expected[0], expected[1][:2]]
    # Eight passes compute both captions, and one the two vectors.
    assert engine.stats().steps == 9
    engine.close()


def test_an_abandoned_caption_drops_out(encoder):
    engine = SteppedEngine(endless_model(encoder), SEQ_LEN, 0, ServeSpec())

    async def leave():
        task = asyncio.create_task(answer_inputs(engine, [caption_request(8)]))
        await engine.run_rounds(2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.allow_rounds(100)
        await answer_inputs(engine, [EncodeRequest(token_ids=(0, 5, 6))])

    asyncio.run(leave())
    stats = engine.stats()
    # The third pass had begun when the client left.
    assert stats.steps <= 4
    assert (stats.waiting, stats.running, stats.requests) == (0, 0, 2)
    engine.close()


def test_figures_count_requests_from_their_admission_to_their_end(encoder):
    _, model = encoder
    engine, text = EncoderEngine(model, SEQ_LEN, 0, ServeSpec()), EncodeRequest(token_ids=(0, 5, 6))
    with engine.admission("ann"):
        stats = engine.stats()
        assert (stats.waiting, stats.running, stats.requests) == (1, 0, 0)
    asyncio.run(answer_inputs(engine, [text] * 5))
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.requests, stats.prompt_tokens) == (0, 0, 2, 15)
    assert (stats.queue.count, stats.first_token.count, stats.answer_tokens) == (1, 1, 0)
    engine.close()


def test_a_full_engine_refuses_requests_and_a_closed_one_fails_them(encoder):
    _, model = encoder
    engine = EncoderEngine(model, SEQ_LEN, 0, ServeSpec(max_concurrency=1, max_waiting=1))
    reason = "2 requests are computed or wait already"
    with engine.admission(""), engine.admission(""), pytest.raises(BusyError, match=reason), engine.admission(""):
        pass
    with engine.admission(""):
        pass
    engine.close()
    with pytest.raises(EngineError, match="it was closed"):
        asyncio.run(answer_inputs(engine, [EncodeRequest(token_ids=(0, 5, 6))]))
    with pytest.raises(EngineError, match="it was closed"), engine.admission(""):
        pass


def test_an_error_of_the_model_breaks_the_engine(encoder):
    run, _ = encoder
    model = build_model(run.spec().model).eval()
    engine = EncoderEngine(model, SEQ_LEN, 0, ServeSpec())
    with pytest.raises(EngineError, match="IndexError"):
        asyncio.run(answer_inputs(engine, [EncodeRequest(token_ids=(0, 999_999))]))
    assert "IndexError" in engine.failure_reason
    engine.close()


def test_padding_is_neither_counted_as_tokens_nor_as_routes(encoder):
    _, model = encoder
    texts = [EncodeRequest(token_ids=(0, *range(5, 5 + length))) for length in (1, 2, SEQ_LEN - 1)]
    engine = EncoderEngine(model, SEQ_LEN, 0, ServeSpec())
    counts = []
    for requests in (texts, *([text] for text in texts)):
        first_stats = engine.stats()
        asyncio.run(answer_inputs(engine, requests))
        last_stats = engine.stats()
        routes = np.array(last_stats.count_LE) - np.array(first_stats.count_LE)
        counts.append((last_stats.step_tokens - first_stats.step_tokens, routes))
    (joint_tokens, joint_routes), *single_counts = counts
    assert joint_tokens == sum(len(text.token_ids) for text in texts) == sum(tokens for tokens, _ in single_counts)
    moe = model.spec.moe
    assert (joint_routes.sum(1) == joint_tokens * moe.heads * moe.top_k).all()
    engine.close()
