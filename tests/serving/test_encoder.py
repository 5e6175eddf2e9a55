"""Tests of serving an encoder: vectors, ranking, captions and routes over HTTP, by OpenAI's client and by hand."""

import asyncio
import base64
import hashlib
import json
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import httpx
import numpy as np
import openai
import pytest
import torch

from mhmoe_ray.checkpoint.manifest import checkpoint_name, read_manifest
from mhmoe_ray.cli.serve import caption_command
from mhmoe_ray.data.crops import crop_pixels
from mhmoe_ray.data.encoder_batches import BatchMaker
from mhmoe_ray.data.encoder_samples import SampleMaker
from mhmoe_ray.errors import ServeError
from mhmoe_ray.evaluate.encoder import EncoderMeter
from mhmoe_ray.evaluate.retrieval import Candidates
from mhmoe_ray.model.build import build_model
from mhmoe_ray.model.captions import write_captions
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.runs.directory import create_run
from mhmoe_ray.serving import load
from mhmoe_ray.serving.api.app import create_app
from mhmoe_ray.serving.encoder import names
from mhmoe_ray.serving.encoder.answer import EncoderAnswerer
from mhmoe_ray.serving.encoder.engine import EncoderEngine
from mhmoe_ray.serving.encoder.request import MAX_DOCUMENTS, EncodeRequest
from mhmoe_ray.serving.engine import BusyError, EngineError
from mhmoe_ray.serving.images import read_image_url
from mhmoe_ray.serving.load import check_served, load_served
from mhmoe_ray.spec import KeySpec, ServeSpec
from tests.data.pictures import encode_image
from tests.encoders import ENCODER, PADDING, encoder_spec
from tests.saved import commit_checkpoint, save_tensors
from tests.serving.asking import answer_inputs, call
from tests.serving.conftest import build_tokenizer, serve_app
from tests.serving.hostile_images import HOSTILE_IMAGES, recording_server

SEQ_LEN = 12
WORDS = ["the fox", "jumps over", "lazy dog", "quick", "brown fox jumps"]
SOURCES = {**ENCODER["data"]["sources"], "written": {"path": "/nowhere/written", "format": "webdataset"}}
CAPTIONS = {"captions_of": {"sources": ["written"], "micro_batch_size": 2, "objective": "caption"}}


def make_encoder_run(folder, *, writes_captions=True, d_match=8):
    """Return a run with a checkpoint of an encoder with random weights, and the model."""
    parts = {name: part for name, part in ENCODER["data"]["parts"].items() if d_match or name != "match"}
    sources = {name: source for name, source in SOURCES.items() if d_match or name != "matched"}
    if writes_captions:
        parts |= CAPTIONS
    else:
        del sources["written"]
    spec = encoder_spec(
        storage=str(folder / "runs"),
        data__parts=parts,
        data__sources=sources,
        data__prepared=str(folder / "prepared"),
        train__micro_batch_size=sum(part["micro_batch_size"] for part in parts.values()),
        model__encoder__d_match=d_match,
    )
    run = create_run(spec)
    build_tokenizer().save(str(run.tokenizer_file))
    model = build_model(spec.model).eval().requires_grad_(False)
    init_weights(model, 3)
    checkpoint = run.checkpoints / checkpoint_name(1, 1)
    checkpoint.mkdir(parents=True)
    save_tensors(checkpoint / "weights", model.named_tensors())
    commit_checkpoint(checkpoint, spec.model, seed=3, seq_len=SEQ_LEN)
    return run, model


class SteppedEngine(EncoderEngine):
    """Engine that computes a round only once a test allows it."""

    def __init__(self, *args):
        self._allowed_rounds = threading.Semaphore(0)
        super().__init__(*args)

    def _compute(self, inputs):
        self._allowed_rounds.acquire()
        return super()._compute(inputs)

    def allow_rounds(self, count):
        for _ in range(count):
            self._allowed_rounds.release()

    async def run_rounds(self, count):
        """Let the engine compute rounds, and wait until it has."""
        steps = self.stats().steps + count
        self.allow_rounds(count)
        while self.stats().steps < steps:
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder_run(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def checkpoint(encoder):
    run, _ = encoder
    return run.checkpoints / checkpoint_name(1, 1)


@pytest.fixture(scope="module")
def answerer(checkpoint):
    answerer = load_served(checkpoint, ServeSpec(max_concurrency=4))
    yield answerer
    answerer.engine.close()


@pytest.fixture(scope="module")
def url(answerer):
    with serve_app(create_app(answerer, "pictures", ServeSpec(max_concurrency=4))) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


IMAGES = [encode_image(np.random.default_rng(n).integers(0, 256, (20, 24, 3), np.uint8)) for n in range(5)]
URLS = [data_url(image) for image in IMAGES]


@pytest.fixture(scope="module")
def similarities(encoder, answerer):
    """Return the similarities by which `mhmoe eval` ranks, of `IMAGES` and `WORDS`."""
    run, model = encoder
    rows = np.full((len(WORDS), SEQ_LEN), PADDING, np.uint16)
    for row, text in zip(rows, WORDS, strict=True):
        token_ids = answerer.encode(text)
        row[: len(token_ids)] = token_ids
    meter = EncoderMeter(model, run.spec(), use_bfloat16=False, on_progress=lambda *_: None)
    return meter.similarities(Candidates(IMAGES, rows, np.eye(5, dtype=bool)))


def test_openai_client_gets_the_vectors_of_texts_and_images(client, similarities):
    vectors = {
        encoding_format: np.array(
            [item.embedding for item in client.embeddings.create(model="pictures", input=[*URLS, *WORDS]).data]
        )
        for encoding_format in ("base64", "float")
    }
    assert np.allclose(np.linalg.norm(vectors["float"], axis=1), 1, atol=1e-5)
    assert np.allclose(vectors["base64"], vectors["float"], atol=1e-6)
    cosines = vectors["float"][:5] @ vectors["float"][5:].T
    assert np.allclose(cosines, similarities, atol=1e-5)
    single_vector = client.embeddings.create(model="pictures", input=URLS[2], encoding_format="float").data[0].embedding
    assert np.allclose(single_vector, vectors["float"][2], atol=1e-5)


def test_ranking_is_that_of_the_evaluation(url, similarities):
    for number, image_url in enumerate(URLS):
        body = {"query": {"image": image_url}, "documents": WORDS}
        results = httpx.post(f"{url}/rerank", json=body).json()["results"]
        assert [result["index"] for result in results] == np.argsort(-similarities[number], kind="stable").tolist()
        scores = [similarities[number, result["index"]] for result in results]
        assert [result["relevance_score"] for result in results] == pytest.approx(scores, abs=1e-5)
    body = {"query": WORDS[1], "documents": [{"image": url} for url in URLS], "top_n": 2, "return_documents": True}
    results = httpx.post(f"{url}/v1/rerank", json=body).json()["results"]
    assert [result["index"] for result in results] == np.argsort(-similarities[:, 1], kind="stable")[:2].tolist()
    assert results[0]["document"] == {"image": URLS[results[0]["index"]]}


def chat_messages(image_url):
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": image_url}}]
    return [{"role": "user", "content": parts}]


def test_a_conversation_with_an_image_is_answered_by_its_caption(client, encoder, answerer):
    _, model = encoder
    images = torch.from_numpy(np.stack([crop_pixels(read_image_url(image_url), 16) for image_url in URLS]))
    start_token = answerer.start_token
    captions = write_captions(model, images, start_token, SEQ_LEN - 1)
    assert len({tuple(caption) for caption in captions}) > 1
    for image_url, caption in zip(URLS, captions, strict=True):
        answer = client.chat.completions.create(model="pictures", messages=chat_messages(image_url))
        assert answer.choices[0].message.content == answerer.decode(caption).strip()
        assert answer.usage.completion_tokens == len(caption)
    longest = max(captions, key=len)
    number = captions.index(longest)
    cut = client.chat.completions.create(model="pictures", messages=chat_messages(URLS[number]), max_tokens=1)
    assert cut.choices[0].message.content == answerer.decode(longest[:1]).strip()
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 1)
    chunks = list(client.chat.completions.create(model="pictures", messages=chat_messages(URLS[0]), stream=True))
    assert chunks[0].choices[0].delta.content == answerer.decode(captions[0]).strip()


def test_routes_are_those_of_the_patches(url, encoder):
    """One layer has experts, 4 x 4 patches and two heads; the position of the image as a whole is left out."""
    run, model = encoder
    body = httpx.post(f"{url}/routes", json={"image": URLS[0]}).json()
    part = run.spec().parts[1]._replace(samples=1, objective="contrastive")
    tokens = np.empty((0, SEQ_LEN), np.uint16)
    samples = SampleMaker(run.spec(), 2).make(part, tokens, IMAGES[:1], [""], crops=False)
    [routing] = model.encode(BatchMaker(run.spec().model, torch.device("cpu")).make([part], samples)).routing
    assert (body["patches_per_side"], body["experts"]) == (4, model.spec.moe.experts)
    assert body["routes"] == [routing.expert_NK[:, 0].view(17, 2)[1:].tolist()]
    stats = httpx.get(f"{url}/stats").json()["replicas"][0]
    assert sum(stats["count_LE"][0]) > 0


HOSTILE_URLS = {name: (data_url(content), reason) for name, (content, reason) in HOSTILE_IMAGES.items()}
HOSTILE_URLS["not-base64"] = ("data:image/png;base64,@@@", "not base64")


@pytest.mark.parametrize(("image_url", "reason"), HOSTILE_URLS.values(), ids=HOSTILE_URLS)
def test_hostile_images_are_refused(client, image_url, reason):
    with pytest.raises(openai.BadRequestError, match=reason) as error:
        client.embeddings.create(model="pictures", input=[WORDS[0], image_url])
    assert error.value.body["code"] == "invalid_image"
    with pytest.raises(openai.BadRequestError, match=reason):
        client.chat.completions.create(model="pictures", messages=chat_messages(image_url))
    assert client.embeddings.create(model="pictures", input=WORDS[0]).data


def test_addresses_of_images_are_never_fetched(client):
    with recording_server() as server:
        address = f"{server.url}/picture.png"
        with pytest.raises(openai.BadRequestError, match="other URLs are not fetched"):
            client.chat.completions.create(model="pictures", messages=chat_messages(address))
        # As an input of /v1/embeddings an address is a text like any other.
        with pytest.raises(openai.BadRequestError, match="shorten it"):
            client.embeddings.create(model="pictures", input=address)
    assert server.requested_paths == []


@pytest.mark.parametrize(
    ("route", "body", "status", "param"),
    [
        ("v1/embeddings", {"input": []}, 400, "input"),
        ("v1/embeddings", {"input": "fox", "dimensions": 4}, 400, "dimensions"),
        ("v1/embeddings", {"input": "fox", "model": "other"}, 404, "model"),
        ("rerank", {"query": {"text": "fox", "image": URLS[0]}, "documents": ["dog"]}, 400, "query"),
        ("rerank", {"query": "fox", "documents": [{}]}, 400, "documents"),
        ("rerank", {"query": "fox", "documents": [{"image": "http://127.0.0.1/a.png"}]}, 400, "documents"),
        ("v1/chat/completions", {"messages": [{"role": "user", "content": "fox"}]}, 400, "messages"),
        ("v1/chat/completions", {"messages": chat_messages(URLS[0]), "max_tokens": 513}, 400, "max_tokens"),
        (
            "v1/chat/completions",
            {"messages": chat_messages(URLS[0]), "max_tokens": 1, "max_completion_tokens": 513},
            400,
            "max_completion_tokens",
        ),
        ("routes", {"image": "fox"}, 400, "image"),
        ("v1/completions", {"prompt": "fox"}, 404, None),
    ],
)
def test_wrong_requests_are_refused_by_the_name_of_the_field(url, route, body, status, param):
    answer = httpx.post(f"{url}/{route}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_requests_of_many_clients_get_their_own_answers(answerer, client):
    with ThreadPoolExecutor(24) as pool:
        futures = [
            pool.submit(client.embeddings.create, model="pictures", input=WORDS[n % 5], encoding_format="float")
            for n in range(48)
        ]
        vectors = [np.array(future.result().data[0].embedding) for future in futures]
    assert all(np.allclose(vector, vectors[number % 5], atol=1e-5) for number, vector in enumerate(vectors))
    stats = answerer.engine.stats()
    assert (stats.waiting, stats.running) == (0, 0)


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


def endless_model(encoder):
    """Return a model whose captions never end by themselves."""
    run, _ = encoder
    model = build_model(run.spec().model).eval().requires_grad_(False)
    init_weights(model, 3)
    model.output["text"].bias[0] = -1e4
    return model


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


def test_texts_are_logged_without_images_only_if_the_spec_says_so(answerer, caplog):
    caplog.set_level("INFO")
    for spec in (ServeSpec(), ServeSpec(log_prompts=True)):
        app = create_app(answerer, "pictures", spec)
        caplog.clear()
        call(app, "POST", "/v1/embeddings", json={"input": [WORDS[0], URLS[0]]})
        call(app, "POST", "/rerank", json={"query": WORDS[1], "documents": [{"image": URLS[0]}]})
        messages = [record.getMessage() for record in caplog.records if "asks" in record.getMessage()]
        assert messages == [f"somebody asks: {text!r}" for text in WORDS[:2]] * spec.log_prompts


def test_tokens_of_a_text_are_those_that_the_model_reads(answerer):
    app, text = create_app(answerer, "pictures", ServeSpec()), "<|endoftext|>"
    tokens = call(app, "POST", "/tokenize", json={"prompt": text}).json()["tokens"]
    assert tokens == list(asyncio.run(answerer.read_text(text)).token_ids)
    assert (tokens[0], answerer.start_token in tokens[1:]) == (answerer.start_token, False)
    usage = call(app, "POST", "/v1/embeddings", json={"input": "fox"}).json()["usage"]
    assert call(app, "POST", "/tokenize", json={"prompt": "fox"}).json()["count"] == usage["prompt_tokens"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_printed_command_of_captions_is_answered(url, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
    (tmp_path / "image.jpg").write_bytes(encode_image(pixels, "jpg", quality=95))
    command = ["bash", "-c", caption_command(url)]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    assert json.loads(answer)["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize(
    ("route", "body", "rounds"),
    [
        ("v1/embeddings", {"input": WORDS}, 0),
        ("v1/chat/completions", {"messages": chat_messages(URLS[0])}, 2),
    ],
)
def test_a_request_that_times_out_counts_against_the_limit_on_tokens(encoder, answerer, route, body, rounds):
    engine = SteppedEngine(endless_model(encoder), SEQ_LEN, 0, ServeSpec())
    engine.allow_rounds(rounds)
    key = KeySpec(name="ann", sha256=hashlib.sha256(b"secret").hexdigest(), tokens_per_minute=12)
    held_answerer = EncoderAnswerer(
        engine, answerer.tokenizer, answerer.details, answerer.encoder, writes_captions=True
    )
    app = create_app(held_answerer, "pictures", ServeSpec(keys=(key,), request_timeout=0.5))
    headers = {"Authorization": "Bearer secret"}
    answers = [call(app, "POST", f"/{route}", json=body, headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [503, 429]
    engine.allow_rounds(100)
    engine.close()


def test_requests_of_a_broken_engine_cost_nothing(encoder, answerer):
    run, _ = encoder
    engine = EncoderEngine(build_model(run.spec().model).eval(), 2**20, 999_999, ServeSpec())
    key = KeySpec(name="ann", sha256=hashlib.sha256(b"secret").hexdigest(), tokens_per_minute=12)
    broken_answerer = EncoderAnswerer(
        engine, answerer.tokenizer, answerer.details, answerer.encoder, writes_captions=True
    )
    app = create_app(broken_answerer, "pictures", ServeSpec(keys=(key,)))
    body, headers = {"messages": chat_messages(URLS[0])}, {"Authorization": "Bearer secret"}
    answers = [call(app, "POST", "/v1/chat/completions", json=body, headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [503] * 3
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


@pytest.mark.parametrize(
    ("options", "spec", "reason"),
    [
        ({"writes_captions": False, "d_match": None}, ServeSpec(), "neither to match images with texts"),
        ({}, ServeSpec(engine="vllm"), "it computes decoders"),
    ],
)
def test_an_encoder_without_answers_is_refused_before_it_is_loaded(tmp_path, options, spec, reason):
    run, _ = make_encoder_run(tmp_path, **options)
    manifest = read_manifest(run.checkpoints / checkpoint_name(1, 1))
    with pytest.raises(ServeError, match=reason):
        check_served(manifest, spec, run)


def test_an_encoder_is_refused_where_images_cannot_be_decoded(encoder, checkpoint, monkeypatch):
    run, _ = encoder
    monkeypatch.setattr(load, "find_spec", lambda module: None if module == "PIL" else find_spec(module))
    with pytest.raises(ServeError, match=r"it needs the package pillow.*mhmoe-ray\[pictures\]"):
        check_served(read_manifest(checkpoint), ServeSpec(), run)


def test_an_encoder_is_served_without_names_if_they_cannot_be_read(tmp_path, caplog):
    run, _ = make_encoder_run(tmp_path)
    (tmp_path / "prepared").mkdir()
    answerer = load_served(run.checkpoints / checkpoint_name(1, 1), ServeSpec())
    answerer.engine.close()
    assert answerer.names == []
    [warning] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "it has no manifest.json" in warning


@pytest.mark.parametrize(("count", "first_names"), [(0, []), (3, ["0", "1", "2"]), (5000, ["0", "3", "6"])])
def test_page_gets_as_many_names_as_it_can_send(encoder, answerer, checkpoint, monkeypatch, count, first_names):
    run, _ = encoder
    monkeypatch.setattr(names, "_read_names", lambda *_: [str(number) for number in range(count)])
    proposed_names = names.held_out_names(run, read_manifest(checkpoint), answerer.tokenizer)
    assert proposed_names[:3] == first_names
    assert len(proposed_names) <= MAX_DOCUMENTS


def test_an_encoder_of_captions_alone_has_no_vectors(tmp_path):
    run, _ = make_encoder_run(tmp_path, d_match=None)
    answerer = load_served(run.checkpoints / checkpoint_name(1, 1), ServeSpec())
    with serve_app(create_app(answerer, "captions", ServeSpec())) as url:
        assert httpx.post(f"{url}/v1/embeddings", json={"input": "fox"}).status_code == 404
        answer = httpx.post(
            f"{url}/v1/chat/completions",
            content=json.dumps({"messages": chat_messages(URLS[0])}),
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code == 200
        assert httpx.get(f"{url}/ready").status_code == 200
    answerer.engine.close()
