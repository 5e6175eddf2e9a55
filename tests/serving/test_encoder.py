"""Tests of serving an encoder: vectors, ranking, captions and routes over HTTP, by OpenAI's client and by hand."""

import asyncio
import hashlib
import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import httpx
import numpy as np
import openai
import pytest
import torch

from mhmoe_ray.checkpoint.manifest import checkpoint_name, read_manifest
from mhmoe_ray.data.shards.columns import IMAGE, TOKENS
from mhmoe_ray.errors import ServeError
from mhmoe_ray.families.encoder.data.batches import BatchMaker
from mhmoe_ray.families.encoder.data.samples import SampleMaker
from mhmoe_ray.families.encoder.evaluate.meter import EncoderMeter
from mhmoe_ray.families.encoder.evaluate.retrieval import Candidates
from mhmoe_ray.families.encoder.model.captions import write_captions
from mhmoe_ray.families.encoder.serving.answer import EncoderAnswerer
from mhmoe_ray.families.encoder.serving.deployment import caption_command
from mhmoe_ray.families.encoder.serving.engine import EncoderEngine
from mhmoe_ray.families.encoder.serving.names import evenly_spaced
from mhmoe_ray.families.encoder.serving.request import MAX_DOCUMENTS
from mhmoe_ray.families.images.crops import crop_pixels
from mhmoe_ray.families.images.image_urls import read_image_url
from mhmoe_ray.model.build import build_model
from mhmoe_ray.serving import family
from mhmoe_ray.serving.api.app import create_app
from mhmoe_ray.serving.load import check_served, load_served
from mhmoe_ray.spec import KeySpec, ServeSpec
from tests.serving.asking import call
from tests.serving.conftest import serve_app
from tests.serving.hostile_images import HOSTILE_IMAGES, recording_server
from tests.support.encoders import PADDING
from tests.support.images import encode_image
from tests.support.served_encoder import IMAGES, SEQ_LEN, URLS, SteppedEngine, data_url, endless_model, make_encoder_run

WORDS = ["the fox", "jumps over", "lazy dog", "quick", "brown fox jumps"]


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
    neutral_fields = {"tools": [], "response_format": {"type": "text"}, "store": False, "user": "ann"}
    request = {"model": "pictures", "messages": chat_messages(URLS[0]), **neutral_fields}
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert chunks[0].choices[0].delta.content == answerer.decode(captions[0]).strip()


def test_routes_are_those_of_the_patches(url, encoder):
    """The image has 4 x 4 patches, and the only layer with experts splits each into two sub-tokens. The routes of the
    position that stands for the whole image are left out."""
    run, model = encoder
    body = httpx.post(f"{url}/routes", json={"image": URLS[0]}).json()
    part = run.spec().parts[1]._replace(samples=1, objective="contrastive")
    tokens = np.empty((0, SEQ_LEN), np.uint16)
    samples = SampleMaker(run.spec(), 2).make(part, {TOKENS: tokens, IMAGE: IMAGES[:1]}, [""], crops=False)
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
        address = f"{server.url}/image.png"
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


@pytest.mark.parametrize(
    ("route", "body", "path"),
    [
        ("rerank", {"query": "fox", "documents": ["a", {"text": "b", "title": "c"}]}, "documents.1.title"),
        ("rerank", {"query": {"text": "fox", "title": "c"}, "documents": ["a"]}, "query.title"),
        (
            "v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a", "size": 1}}]}]},
            "messages.0.content.0.image_url.size",
        ),
    ],
)
def test_nested_field_that_is_not_supported_is_named_by_its_path(answerer, route, body, path):
    response = call(create_app(answerer, "pictures", ServeSpec()), "POST", f"/{route}", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["message"]) == (400, f"{path!r} is not supported")
    assert (error["param"], error["code"]) == (path.partition(".")[0], "unsupported_parameter")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "at least 1 item"),
        (["fox"] * (MAX_DOCUMENTS + 1), f"at most {MAX_DOCUMENTS} items"),
        (5, "should be a valid list"),
        ("\ud800", "surrogates not allowed"),
    ],
)
def test_wrong_input_of_vectors_is_explained(answerer, value, message):
    body, headers = json.dumps({"input": value}), {"Content-Type": "application/json"}
    response = call(
        create_app(answerer, "pictures", ServeSpec()), "POST", "/v1/embeddings", content=body, headers=headers
    )
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "input")
    assert message in error["message"]


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
@pytest.mark.long
def test_a_request_that_times_out_counts_against_the_limit_on_tokens(encoder, answerer, route, body, rounds):
    engine = SteppedEngine(endless_model(encoder), SEQ_LEN, 0, ServeSpec())
    engine.allow_rounds(rounds)
    key = KeySpec(name="ann", sha256=hashlib.sha256(b"secret").hexdigest(), tokens_per_minute=12)
    held_answerer = EncoderAnswerer(
        engine, answerer.tokenizer, answerer.details, answerer.encoder, writes_captions=True
    )
    app = create_app(held_answerer, "pictures", ServeSpec(keys=(key,), request_timeout=3))
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
    monkeypatch.setattr(family, "find_spec", lambda module: None if module == "PIL" else find_spec(module))
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


@pytest.mark.parametrize(("count", "first_names"), [(0, []), (3, ["0", "1", "2"]), (5000, ["0", "3", "6"])])
def test_page_gets_as_many_names_as_it_can_send(count, first_names):
    names = evenly_spaced([str(number) for number in range(count)], MAX_DOCUMENTS)
    assert names[:3] == first_names
    assert len(names) <= MAX_DOCUMENTS
