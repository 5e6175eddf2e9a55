"""Tests of serving a vision model over HTTP, by Hugging Face's client and by hand."""

import asyncio
import base64
import hashlib
import io
import json
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from typer.testing import CliRunner

import mhmoe_ray as mh
from mhmoe_ray.api import connection
from mhmoe_ray.checkpoint.huggingface.export import export
from mhmoe_ray.checkpoint.manifest import checkpoint_name, read_manifest
from mhmoe_ray.cli.app import app as cli_app
from mhmoe_ray.data.images.annotations import Annotation, Instance, decode_mask, pack
from mhmoe_ray.data.shards.columns import ANNOTATION, IMAGE
from mhmoe_ray.errors import CheckpointError, ServeError
from mhmoe_ray.families.vision.data.samples import TaskSampleMaker
from mhmoe_ray.families.vision.evaluate.figures import VisionMeter
from mhmoe_ray.families.vision.serving.deployment import image_command
from mhmoe_ray.families.vision.serving.engine import VisionEngine
from mhmoe_ray.families.vision.serving.request import VisionRequest
from mhmoe_ray.serving.api.app import create_app
from mhmoe_ray.serving.engine import BusyError, EngineError
from mhmoe_ray.serving.load import check_served, load_served
from mhmoe_ray.spec import KeySpec, ServeSpec
from tests.serving.asking import answer_inputs, call
from tests.serving.conftest import serve_app
from tests.serving.hostile_images import HOSTILE_IMAGES, recording_server
from tests.support.images import encode_image
from tests.support.served_vision import CLASSES, make_vision_run, random_pixels

SIZES = [(40, 60), (60, 36), (33, 33)]
"""Height and width of each image."""
IMAGES = [encode_image(random_pixels(number, *size)) for number, size in enumerate(SIZES)]
KINDS = ("image-classification", "object-detection", "image-segmentation")


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    return make_vision_run(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def checkpoint(vision):
    run, _ = vision
    return run.checkpoints / checkpoint_name(1, 1)


@pytest.fixture(scope="module")
def answerer(checkpoint):
    answerer = load_served(checkpoint, ServeSpec(max_concurrency=4))
    yield answerer
    answerer.engine.close()


@pytest.fixture(scope="module")
def url(answerer):
    with serve_app(create_app(answerer, "scenes", ServeSpec(max_concurrency=4))) as url:
        yield url


def hub_client(url, route, task=None):
    query = f"?task={task}" if task else ""
    return huggingface_hub.InferenceClient(model=f"{url}/{route}{query}")


def measured(vision, task):
    """Return the outputs of `mhmoe eval` for each of `IMAGES`."""
    run, model = vision
    spec = run.spec()
    [part] = [part for part in spec.parts if part.name == task]
    if part.objective == "classify":
        annotations = [Annotation(CLASSES[task][0])] * len(IMAGES)
    else:
        counts = ["0"] * len(IMAGES)
        if part.has_masks:
            from pycocotools import mask as coco_masks

            counts = [coco_masks.encode(np.ones(size, np.uint8, order="F"))["counts"].decode() for size in SIZES]
        instances = [
            Instance(CLASSES[task][0], (0, 0, width, height), mask if part.has_masks else None)
            for (height, width), mask in zip(SIZES, counts, strict=True)
        ]
        annotations = [Annotation(None, (instance,), number) for number, instance in enumerate(instances)]
    stored = {IMAGE: IMAGES, ANNOTATION: [pack(annotation) for annotation in annotations]}
    samples = TaskSampleMaker(spec, CLASSES).make(part, stored, [""] * len(IMAGES), crops=False)
    meter = VisionMeter(model, use_bfloat16=False, on_progress=lambda *_: None)
    return list(meter.run(part, samples, IMAGES, task))


@pytest.mark.parametrize("task", ["animals", "weather"])
def test_hub_client_classifies_as_the_evaluation_does(vision, url, task):
    for image, output in zip(IMAGES, measured(vision, task), strict=True):
        answer = hub_client(url, "image-classification", task).image_classification(image)
        probabilities = torch.from_numpy(output.logits_NC[0]).softmax(0).tolist()
        expected = sorted(zip(CLASSES[task], probabilities, strict=False), key=lambda pair: -pair[1])
        assert [element.label for element in answer] == [label for label, _ in expected]
        assert [element.score for element in answer] == pytest.approx([score for _, score in expected], abs=1e-5)


def test_parameters_of_classes_have_their_effect(vision, url):
    logits = dict(zip(CLASSES["animals"], measured(vision, "animals")[0].logits_NC[0].tolist(), strict=False))
    client = hub_client(url, "image-classification")
    best = sorted(logits, key=logits.get)[::-1]
    answer = client.image_classification(IMAGES[0], top_k=2, function_to_apply="none")
    assert [(element.label, element.score) for element in answer] == [
        (label, pytest.approx(logits[label], abs=1e-4)) for label in best[:2]
    ]
    scores = {e.label: e.score for e in client.image_classification(IMAGES[0], function_to_apply="sigmoid")}
    assert scores == {label: pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5) for label, logit in logits.items()}


@pytest.mark.parametrize("task", ["things", "marks"])
def test_hub_client_finds_the_objects_of_the_evaluation(vision, url, task):
    boxes_seen = 0
    for image, output in zip(IMAGES, measured(vision, task), strict=True):
        [detection] = output.detections
        answer = hub_client(url, "object-detection", task).object_detection(image, threshold=0)
        inside = [number for number, box in enumerate(detection.boxes) if box[2] > box[0] and box[3] > box[1]]
        assert [element.label for element in answer] == [CLASSES[task][detection.classes[n]] for n in inside]
        assert [element.score for element in answer] == pytest.approx([detection.scores[n] for n in inside], abs=1e-5)
        boxes = [[e.box.xmin, e.box.ymin, e.box.xmax, e.box.ymax] for e in answer]
        assert np.abs(np.array(boxes) - detection.boxes[inside]).max() < 0.51
        certain = hub_client(url, "object-detection", task).object_detection(image)
        assert len(certain) == sum(element.score >= 0.5 for element in answer)
        boxes_seen += len(certain)
    assert boxes_seen


def test_hub_client_gets_the_masks_of_the_evaluation_in_the_size_of_the_image(vision, url):
    client, pixels = hub_client(url, "image-segmentation"), 0
    for image, (height, width), output in zip(IMAGES, SIZES, measured(vision, "things"), strict=True):
        [detection] = output.detections
        answer = client.image_segmentation(image, threshold=0.0, mask_threshold=0.5)
        inside = [number for number, box in enumerate(detection.boxes) if box[2] > box[0] and box[3] > box[1]]
        assert [element.label for element in answer] == [CLASSES["things"][detection.classes[n]] for n in inside]
        for element, number in zip(answer, inside, strict=True):
            expected = decode_mask(detection.masks[number].decode(), width, height)
            mask = np.asarray(element.mask)
            assert (element.mask.mode, set(np.unique(mask)) <= {0, 255}) == ("L", True)
            assert np.mean((mask > 0) != expected) < 0.002
            pixels += int(expected.sum())
        lenient = client.image_segmentation(image, threshold=0.0, mask_threshold=0.1, subtask="instance")
        assert all((np.asarray(a.mask) >= np.asarray(b.mask)).all() for a, b in zip(lenient, answer, strict=True))
    assert pixels


def test_engine_keeps_the_small_masks_of_the_detector(answerer):
    async def detect():
        image = await answerer.read("things", IMAGES[0])
        with answerer.engine.admission("") as request:
            return await answerer.compute(request, "things", image)

    objects = asyncio.run(detect()).objects
    assert objects.box_mask_OYX.shape == (len(objects.box_O4), 28, 28)
    assert len(objects.box_O4)


def test_other_images_are_answered_while_masks_are_drawn(answerer):
    app, may_draw = create_app(answerer, "scenes", ServeSpec()), threading.Event()

    async def ask_both():
        held_thread = asyncio.create_task(answerer._mask_thread.run(may_draw.wait))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            url = "/image-segmentation?task=things"
            body = {"inputs": base64.b64encode(IMAGES[0]).decode(), "parameters": {"threshold": 0}}
            segmentation = asyncio.create_task(client.post(url, json=body))
            detection = await client.post("/object-detection?task=things", content=IMAGES[1])
            is_drawn = segmentation.done()
            may_draw.set()
            await held_thread
            return detection, is_drawn, await segmentation

    detection, is_drawn, segmentation = asyncio.run(asyncio.wait_for(ask_both(), 60))
    assert (detection.status_code, is_drawn, segmentation.status_code) == (200, False, 200)
    assert segmentation.json()


@pytest.mark.parametrize("content_type", ["image/png", "application/octet-stream", "image/x-unknown", None])
def test_body_is_the_image_or_json_with_it(url, content_type):
    route = f"{url}/object-detection?task=things"
    headers = {} if content_type is None else {"Content-Type": content_type}
    expected = httpx.post(route, content=IMAGES[1], headers=headers)
    assert expected.status_code == 200
    encoded = base64.b64encode(IMAGES[1]).decode()
    for inputs in (encoded, f"data:image/png;base64,{encoded}"):
        for body in ({"inputs": inputs}, {"inputs": inputs, "parameters": {"threshold": None}}):
            assert httpx.post(route, json=body).json() == expected.json()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_printed_command_is_answered(url, tmp_path):
    # Photos may be larger than 1 MiB, the limit of bodies of requests to a decoder; that of a vision model is larger.
    photo = encode_image(np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8), "jpg", quality=95)
    assert len(photo) > 1 << 20
    (tmp_path / "image.jpg").write_bytes(photo)
    command = ["bash", "-c", image_command(f"{url}/object-detection")]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    assert set(json.loads(answer)[0]) == {"label", "score", "box"}


def test_image_is_turned_as_its_camera_says(url):
    turned, sink = Image.Exif(), io.BytesIO()
    turned[0x0112] = 6
    Image.fromarray(random_pixels(1, 40, 60)).save(sink, "JPEG", exif=turned)
    [element, *_] = hub_client(url, "image-segmentation").image_segmentation(sink.getvalue(), threshold=0.0)
    assert element.mask.size == (40, 60)


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ("image-classification?task=things", "no task 'things' for image-classification"),
        ("object-detection?task=nowhere", "no task 'nowhere' for object-detection"),
        (
            "image-segmentation?task=marks",
            r"things \(object-detection and image-segmentation\), marks \(object-detection\)",
        ),
    ],
)
def test_task_that_the_model_lacks_is_answered_by_those_that_it_has(url, route, message):
    with pytest.raises(HfHubHTTPError, match=message) as error:
        huggingface_hub.InferenceClient(model=f"{url}/{route}").object_detection(IMAGES[0])
    assert error.value.response.status_code == 404


def test_model_of_one_kind_refuses_the_others(tmp_path):
    run, _ = make_vision_run(tmp_path, ("weather",))
    answerer = load_served(run.checkpoints / checkpoint_name(1, 1), ServeSpec())
    app = create_app(answerer, "weather", ServeSpec())
    answers = {kind: call(app, "POST", f"/{kind}", content=IMAGES[0]) for kind in KINDS}
    answerer.engine.close()
    assert [answer.status_code for answer in answers.values()] == [200, 404, 404]
    error = answers["object-detection"].json()["error"]
    assert (
        error["message"] == "there is no task for object-detection here; this model has weather (image-classification)"
    )


HOSTILE_BODIES = {**HOSTILE_IMAGES, "empty": (b"", "empty")}


@pytest.mark.parametrize(("content", "message"), HOSTILE_BODIES.values(), ids=HOSTILE_BODIES)
@pytest.mark.parametrize("route", KINDS)
def test_hostile_images_are_refused(url, answerer, route, content, message):
    passes = answerer.engine.stats().steps
    bodies = ({"content": content}, {"json": {"inputs": base64.b64encode(content).decode()}})
    for body in bodies:
        answer = httpx.post(f"{url}/{route}", **body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_image"), answer.text
        assert message in answer.json()["error"]["message"]
    assert answerer.engine.stats().steps == passes


@pytest.mark.parametrize(
    ("route", "request_options", "status", "param"),
    [
        ("image-classification", {"content": b"a=b", "headers": {"Content-Type": "text/plain"}}, 415, None),
        ("image-classification", {"data": {"inputs": "x"}}, 415, None),
        ("image-classification", {"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, None),
        ("image-classification", {"json": []}, 400, None),
        ("image-classification", {"json": {}}, 400, "inputs"),
        ("image-classification", {"json": {"inputs": "@@@"}}, 400, "inputs"),
        ("image-classification", {"json": {"inputs": "data:text/html;base64,AAAA"}}, 400, "inputs"),
        ("image-classification", {"json": {"inputs": 5}}, 400, "inputs"),
        ("image-classification", {"json": {"inputs": "AAAA", "options": {}}}, 400, "options"),
        ("image-segmentation", {"content": bytes(17 << 20)}, 413, None),
        ("routes", {"json": {"image": "http://127.0.0.1/a.png"}}, 400, "image"),
        ("routes", {"json": {"image": "x", "task": "nowhere"}}, 404, "task"),
        ("routes", {"json": {"image": "x", "model": "other"}}, 404, "model"),
        ("v1/embeddings", {"json": {"input": "fox"}}, 404, None),
        ("tokenize", {"json": {"prompt": "fox"}}, 404, None),
    ],
)
def test_wrong_requests_are_refused_by_the_name_of_the_field(url, route, request_options, status, param):
    answer = httpx.post(f"{url}/{route}", **request_options)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


@pytest.mark.parametrize(
    ("route", "parameters"),
    [
        ("image-classification", {"top_k": 0}),
        ("image-classification", {"top_k": "many"}),
        ("image-classification", {"function_to_apply": "relu"}),
        ("image-classification", {"threshold": 0.5}),
        ("object-detection", {"threshold": 2}),
        ("image-segmentation", {"mask_threshold": -1}),
        ("image-segmentation", {"subtask": "panoptic"}),
        ("image-segmentation", {"overlap_mask_area_threshold": 0.5}),
    ],
)
def test_wrong_parameters_are_refused_by_their_name(url, route, parameters):
    body = {"inputs": base64.b64encode(IMAGES[0]).decode(), "parameters": parameters}
    error = httpx.post(f"{url}/{route}", json=body).json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", f"parameters.{next(iter(parameters))}")


def test_addresses_of_images_are_never_fetched(url):
    with recording_server() as server:
        for address in (f"{server.url}/a.png", "https://127.0.0.1/a.png", "file:///a.png"):
            answer = httpx.post(f"{url}/image-classification", json={"inputs": address})
            assert answer.status_code == 400
            assert "other URLs are not fetched" in answer.json()["error"]["message"]
    assert server.requested_paths == []


SQUARES = [("animals", 4, [10, 0, 50, 40]), ("things", 8, [0, 0, 60, 60])]


@pytest.mark.parametrize(("task", "patches_per_side", "square"), SQUARES)
def test_routes_are_those_of_the_patches_of_the_task(vision, url, answerer, task, patches_per_side, square):
    _, model = vision
    image = f"data:image/png;base64,{base64.b64encode(IMAGES[0]).decode()}"
    body = httpx.post(f"{url}/routes", json={"image": image, "task": task}).json()
    pixels = np.array(asyncio.run(answerer.read(task, IMAGES[0])).pixels)
    sizes = {name: spec.image_size for name, spec in model.tasks.items()}
    empty = {name: torch.empty((0, size, size, 3), dtype=torch.uint8) for name, size in sizes.items()}
    routing = model.encode([torch.from_numpy(pixels)[None] if name == task else empty[name] for name in sizes]).routing
    top_k = 1 if task == "animals" else 2
    expected = [layer.expert_NK[:, :top_k].view(patches_per_side**2, 2, top_k).tolist() for layer in routing]
    assert body["routes"] == expected
    assert (body["patches_per_side"], body["square"]) == (patches_per_side, square)
    assert (body["task"], body["experts"], body["top_k"]) == (task, 4, top_k)


def test_tasks_model_and_figures_are_described(url):
    tasks = httpx.get(f"{url}/tasks").json()["tasks"]
    assert {task["name"]: task["classes"] for task in tasks} == CLASSES
    assert [task["top_k"] for task in tasks] == [1, 2, 2, 2]
    [model] = httpx.get(f"{url}/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"], model["details"]["experts"]) == ("scenes", None, 4)
    assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/ready").status_code == 200
    assert 'model="scenes"' in httpx.get(f"{url}/metrics").text
    [stats] = httpx.get(f"{url}/stats").json()["replicas"]
    assert sum(map(sum, stats["count_LE"])) > 0
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    content = paths["/object-detection"]["post"]["requestBody"]["content"]
    assert set(content) == {"image/*", "application/octet-stream", "application/json"}
    assert "createImageBitmap" in httpx.get(f"{url}/").text


def test_keys_and_their_limits_hold(answerer):
    key = KeySpec(name="ann", sha256=hashlib.sha256(b"secret").hexdigest(), tokens_per_minute=10)
    app = create_app(answerer, "scenes", ServeSpec(keys=(key,)))
    for route in (*KINDS, "routes"):
        assert call(app, "POST", f"/{route}", content=IMAGES[0]).status_code == 401
    assert call(app, "GET", "/tasks").status_code == 401
    # An image has more patches than the limit has tokens, so the next request is refused.
    headers = {"Authorization": "Bearer secret"}
    answers = [call(app, "POST", "/image-classification", content=IMAGES[0], headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]


def test_requests_of_many_clients_get_their_own_answers(answerer, url):
    tasks = list(CLASSES)

    def ask(number):
        task = tasks[number % 4]
        kind = "image-classification" if task in ("animals", "weather") else "object-detection"
        return httpx.post(f"{url}/{kind}?task={task}", content=IMAGES[number % 3]).json()

    # The number of images and that of tasks have no common divisor, so 12 requests are all different.
    expected = [ask(number) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(36)))
    for number, answer in enumerate(answers):
        labels = [element["label"] for element in answer]
        assert labels == [element["label"] for element in expected[number % 12]]
        scores = [element["score"] for element in expected[number % 12]]
        assert [element["score"] for element in answer] == pytest.approx(scores, abs=1e-3)
    stats = answerer.engine.stats()
    assert (stats.waiting, stats.running) == (0, 0)


def test_images_of_a_task_share_a_pass_and_those_of_others_come_next(vision):
    _, model = vision
    engine = VisionEngine(model, ServeSpec(max_concurrency=4))
    sizes, finished = {"animals": 16, "weather": 24}, []
    requests = {task: VisionRequest(task, np.zeros((size, size, 3), np.uint8)) for task, size in sizes.items()}

    async def ask(number, task):
        await answer_inputs(engine, [requests[task]])
        finished.append((number, task))

    async def ask_all():
        # The engine takes its first inputs under this lock, so it finds all requests.
        engine._condition.acquire()
        order = ["animals", "weather", "animals", "animals", "animals", "animals"]
        tasks = [asyncio.create_task(ask(number, task)) for number, task in enumerate(order)]
        await asyncio.sleep(0)
        engine._condition.release()
        await asyncio.gather(*tasks)

    asyncio.run(ask_all())
    # Four images of the first task fill a pass, and the other task does not wait until the first has no more images.
    assert [task for _, task in finished] == [*["animals"] * 4, "weather", "animals"]
    assert engine.stats().steps == 3
    engine.close()


def test_a_full_engine_refuses_requests_and_a_broken_one_fails_them(vision):
    _, model = vision
    engine = VisionEngine(model, ServeSpec(max_concurrency=1, max_waiting=1))
    with engine.admission(""), engine.admission(""), pytest.raises(BusyError), engine.admission(""):
        pass
    with pytest.raises(EngineError):
        asyncio.run(answer_inputs(engine, [VisionRequest("animals", np.zeros((7, 7, 3), np.uint8))]))
    with pytest.raises(EngineError), engine.admission(""):
        pass
    assert engine.failure_reason
    engine.close()


def test_another_engine_and_changed_classes_are_refused(tmp_path):
    run, _ = make_vision_run(tmp_path, ("weather",))
    checkpoint = run.checkpoints / checkpoint_name(1, 1)
    with pytest.raises(ServeError, match="it computes decoders, and this is a vision model"):
        check_served(read_manifest(checkpoint), ServeSpec(engine="vllm"), run)
    run.classes_file.write_text('{"weather": ["sun", "rain"]}')
    with pytest.raises(CheckpointError, match="it was trained with another list of classes"):
        load_served(checkpoint, ServeSpec())


def test_commands_for_texts_refuse_a_vision_model_in_a_line(vision, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "connect_to_cluster", lambda *_: pytest.fail("a job was started"))
    run, _ = vision
    with pytest.raises(CheckpointError, match="its model is a vision model, for which there is no exported form"):
        export(checkpoint, read_manifest(checkpoint), tmp_path / "exported")
    with pytest.raises(CheckpointError, match="its model is a vision model, which reads no texts"):
        mh.load(run.path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "fox"}\n')
    batch = ["--input", str(prompts), "--output", str(tmp_path / "answers")]
    for arguments in (["--prompt", "fox"], batch):
        result = CliRunner().invoke(cli_app, ["generate", str(run.path), *arguments])
        assert isinstance(result.exception, CheckpointError | ServeError), result.output
        assert "vision model" in str(result.exception)
