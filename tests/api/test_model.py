"""Tests of models that `mh.load` loads, compared with the decoder and the serving engine that compute their answers."""

import asyncio
import gc
import threading

import numpy as np
import pytest
import torch

import mhmoe_ray as mh
from mhmoe_ray.checkpoint.load import load_model
from mhmoe_ray.checkpoint.manifest import committed_checkpoints
from mhmoe_ray.data.chat.template import BUILT_IN_TEMPLATE
from mhmoe_ray.errors import CheckpointError, RunError, ServeError
from mhmoe_ray.serving.engine import SamplingParams
from mhmoe_ray.serving.engine.sampler import Sampler
from mhmoe_ray.serving.load import load_answerer
from mhmoe_ray.spec import MoESpec, ServeSpec
from tests.checkpoint.huggingface.conftest import DENSE, MODELS, export_run, make_run
from tests.serving.asking import answer_pieces
from tests.support.served_encoder import make_encoder_run
from tests.support.watch import LIMIT, wait_until

PROMPTS = ["the quick", "the dog sleeps", "", "over the hill and"]
SAMPLING = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.8, "top_k": 50, "seed": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run of an MH-MoE model with a chat template."""
    directory = make_run(tmp_path_factory.mktemp("model"), MODELS["all"])
    directory.chat_template_file.write_text(BUILT_IN_TEMPLATE)
    return mh.Run(directory)


@pytest.fixture(scope="module")
def model(run):
    with mh.load(run) as loaded_model:
        yield loaded_model


@pytest.fixture(scope="module")
def expected_answers(run):
    """Return the answers of the serving engine to `PROMPTS`, each asked alone."""
    [checkpoint] = committed_checkpoints(run.directory)
    answerer = load_answerer(checkpoint, ServeSpec())
    params = SamplingParams(**SAMPLING)
    pieces = [
        answer_pieces(answerer, answerer.encode(prompt), params.for_answer(index))
        for index, prompt in enumerate(PROMPTS)
    ]
    answerer.engine.close()
    return ["".join(piece.text for piece in answer) for answer in pieces]


def test_answers_are_those_of_the_serving_engine(model, expected_answers):
    answer = model.generate(PROMPTS[0], **SAMPLING)
    assert answer == (expected_answers[0], 12, "length")
    assert [a.text for a in model.generate(PROMPTS, **SAMPLING)] == expected_answers
    pieces = list(model.stream(PROMPTS[0], **SAMPLING))
    assert "".join(piece.text for piece in pieces) == answer.text
    assert [piece.token_count for piece in pieces] == list(range(1, 13))
    assert model.generate([]) == []


def test_more_prompts_than_the_engine_takes_are_answered(model):
    greedy = model.generate(PROMPTS[0], max_tokens=2, temperature=0)
    assert model.generate([PROMPTS[0]] * 200, max_tokens=2, temperature=0) == [greedy] * 200


def test_conversations_are_rendered_by_the_chat_template(model):
    messages = [{"role": "user", "content": "the quick"}]
    prompt = "User:\nthe quick\nAssistant:\n"
    assert model.encode(messages) == model.encode(prompt)
    assert model.generate(messages, **SAMPLING) == model.generate(prompt, **SAMPLING)
    assert model.generate([messages, messages], **SAMPLING) == model.generate([prompt, prompt], **SAMPLING)
    with pytest.raises(ServeError, match="a role is system, user or assistant"):
        model.generate([{"role": "nobody", "content": "x"}])


def test_token_ids_are_a_prompt(model):
    ids = model.encode(PROMPTS[0])
    answer = model.generate(PROMPTS[0], **SAMPLING)
    for prompt in (ids, tuple(ids), torch.tensor(ids), torch.tensor(ids).numpy()):
        assert model.generate(prompt, **SAMPLING) == answer
    assert model.generate([ids, ids], **SAMPLING) == model.generate([PROMPTS[0]] * 2, **SAMPLING)
    assert "".join(piece.text for piece in model.stream(ids, **SAMPLING)) == answer.text
    assert model.encode(ids) == ids


def test_numbers_of_other_libraries_are_numbers(model):
    numbers = {name: np.array(value)[()] for name, value in SAMPLING.items()}
    assert model.generate(PROMPTS[0], **numbers) == model.generate(PROMPTS[0], **SAMPLING)


def test_stop_strings_end_an_answer(model):
    answer = model.generate(PROMPTS[0], **SAMPLING)
    stop = answer.text[4:6]
    stopped_answer = model.generate(PROMPTS[0], **SAMPLING, stop=[stop])
    assert stopped_answer.text == answer.text[: answer.text.index(stop)]
    assert stopped_answer.finish_reason == "stop"
    # A single text is one stop string, not a list of characters.
    assert model.generate(PROMPTS[0], **SAMPLING, stop=stop) == stopped_answer
    assert "".join(piece.text for piece in model.stream(PROMPTS[0], **SAMPLING, stop=stop)) == stopped_answer.text


def test_closing_a_stream_ends_its_computation(model, monkeypatch):
    """The sampler holds back the second token until the engine knows that the stream is closed."""
    sample, is_first, may_go_on = Sampler.sample, iter([True]), threading.Event()

    def sample_slowly(*arguments):
        if not next(is_first, False):
            assert may_go_on.wait(LIMIT)
        return sample(*arguments)

    model.generate("the", max_tokens=1)
    engine = model._engine.answerer.engine
    monkeypatch.setattr(Sampler, "sample", sample_slowly)
    earlier_tokens = engine.stats().answer_tokens
    pieces = model.stream("the", max_tokens=60)
    next(pieces)
    pieces.close()
    wait_until(lambda: all(state.is_abandoned for state in engine._all_requests()), "an abandoned request")
    may_go_on.set()
    wait_until(lambda: not engine.stats().running, "the end of the request")
    assert engine.stats().answer_tokens - earlier_tokens <= 2


def test_a_loop_that_runs_already_is_no_obstacle(model):
    """A notebook's cells run in a thread with a running event loop."""

    async def cell():
        return model.generate("the quick", max_tokens=3, temperature=0)

    assert asyncio.run(cell()) == model.generate("the quick", max_tokens=3, temperature=0)


def test_logits_are_those_of_the_decoder(run, model):
    [checkpoint] = committed_checkpoints(run.directory)
    decoder, manifest = load_model(checkpoint)
    ids = [1, *model.tokenizer.encode("the quick brown", add_special_tokens=False).ids]
    expected = decoder(torch.tensor([ids])).logits_BTV[0]
    logits = model.logits("the quick brown")
    assert torch.equal(logits, expected)
    assert not logits.requires_grad
    assert torch.equal(model.logits(ids), expected)
    assert torch.equal(model.logits(torch.tensor(ids)), expected)
    assert (model.spec, model.seq_len, model.name) == (manifest.model, 64, f"{run.id}/{checkpoint.name}")
    greedy = model.generate("the quick brown", max_tokens=1, temperature=0)
    assert greedy.text == model.tokenizer.decode([int(expected[-1].argmax())])


@pytest.mark.parametrize("kind", ["all", "mixtral", "dense-subln"])
def test_a_folder_in_hugging_faces_layout_computes_like_its_run(kind, tmp_path):
    directory = make_run(tmp_path, MODELS[kind])
    export_run(directory, tmp_path / "out")
    [checkpoint] = committed_checkpoints(directory)
    with mh.load(tmp_path / "out") as folder_model, mh.load(checkpoint) as checkpoint_model:
        assert torch.equal(folder_model.logits("the quick"), checkpoint_model.logits("the quick"))
        greedy = {"max_tokens": 8, "temperature": 0}
        assert folder_model.generate("the quick", **greedy) == checkpoint_model.generate("the quick", **greedy)
    assert not [path for path in tmp_path.iterdir() if path.name not in ("runs", "out")]


def test_a_model_with_domains_needs_the_domain_of_a_text(tmp_path):
    moe = MoESpec(heads=1, experts=2, top_k=1, d_expert=24, router="domain", domains=["web", "code"])
    directory = make_run(tmp_path, MODELS["dense"].model_validate({**DENSE, "moe": moe.model_dump()}))
    [checkpoint] = committed_checkpoints(directory)
    decoder, _ = load_model(checkpoint)
    with mh.load(mh.Run(directory)) as model:
        token_1T = torch.tensor([model.encode("the quick")])
        for expert, domain in enumerate(["web", "code"]):
            expected = decoder(token_1T, domain_B=torch.tensor([expert])).logits_BTV[0]
            assert torch.equal(model.logits("the quick", domain=domain), expected)
        with pytest.raises(ServeError, match=r"needs the domain of a text.*choose from web, code"):
            model.logits("the quick")
        with pytest.raises(ServeError, match="its router needs the domain of a text"):
            model.generate("the quick")


def test_an_encoder_predicts_no_next_tokens(tmp_path):
    directory, _ = make_encoder_run(tmp_path)
    [checkpoint] = committed_checkpoints(directory)
    with mh.load(checkpoint) as model:
        for function in (model.logits, model.generate):
            with pytest.raises(ServeError, match="it is an encoder, which does not predict next tokens"):
                function("the quick")


def test_a_checkpoint_has_one_name_everywhere(run, model):
    [checkpoint] = run.checkpoints()
    names = (
        (run, checkpoint.name),
        (run, 7),
        (run, "7"),
        (run, np.int64(7)),
        (run, checkpoint),
        (checkpoint, None),
        (run.path, 7),
        (f"{run.id}@7", None),
    )
    for source, name in names:
        with mh.load(source, name, threads=1, storage=run.path.parent) as loaded_model:
            assert loaded_model.name == model.name
            assert loaded_model._threads == 1


def test_mistakes_are_one_line(run, model, tmp_path):
    for parameters, message in (
        ({"top_p": 0}, "top_p: it is 0; give more than 0"),
        ({"max_tokens": 0}, "max_tokens: it is 0; give at least 1"),
        ({"temperature": -1}, "temperature: it is -1"),
        ({"min_p": 2}, "min_p: it is 2"),
        ({"top_k": -1}, "top_k: it is -1"),
        ({"max_tokens": 2.5}, r"max_tokens: it is 2\.5; give a whole number"),
        ({"max_tokens": "5"}, "max_tokens: it is '5'; give a whole number"),
        ({"top_k": 2.5}, r"top_k: it is 2\.5; give a whole number"),
        ({"temperature": "x"}, "temperature: it is 'x'; give a number"),
        ({"seed": "x"}, "seed: it is 'x'; give a whole number"),
        ({"logit_bias": {1: 101}}, "logit_bias: it is 101; give at most 100"),
        ({"logit_bias": {-1: 1}}, "logit_bias: it is -1; give at least 0"),
        ({"logit_bias": {320: 1}}, "logit_bias: there is no token 320; there are 320"),
        ({"logprobs": 21}, "logprobs: it is 21; give at most 20"),
        ({"stop": [5]}, "stop: 5 is not a text"),
        ({"stop": ""}, "stop: an empty text would end every answer at once"),
        ({"stop": ["a", ""]}, "stop: an empty text would end every answer at once"),
    ):
        for function in (model.generate, model.stream):
            with pytest.raises(ServeError, match=message):
                function("the quick", **parameters)
    with pytest.raises(ServeError, match="the prompt: it has"):
        model.generate("the quick brown fox " * 100)
    with pytest.raises(ServeError, match="the prompt: it has"):
        model.logits("the quick brown fox " * 100)
    with pytest.raises(ServeError, match="the model's router does not use domains"):
        model.logits("the", domain="web")
    with pytest.raises(RunError, match="there is no such run"):
        mh.load("nothing", storage=tmp_path)
    for name in ("step_9.9", 9):
        with pytest.raises(
            CheckpointError, match=rf"checkpoint {name}: .*no checkpoint of .*choose from step_00000007\.1"
        ):
            mh.load(run, name)
    with pytest.raises(
        RunError, match=r"^model no/folder: there is no such folder, and as a run: .*RUN@STEP, the folder"
    ):
        mh.load("no/folder", storage=tmp_path)
    [checkpoint] = committed_checkpoints(run.directory)
    with pytest.raises(CheckpointError, match="not a run with several"):
        mh.load(checkpoint, checkpoint.name)
    with pytest.raises(ServeError, match="device tpu: a model computes on a CPU or on a GPU"):
        mh.load(run, device="tpu")
    without_template = make_run(tmp_path, MODELS["dense"])
    with pytest.raises(CheckpointError, match=f"it is of run {run.id}, not of run {without_template.id}"):
        mh.load(mh.Run(without_template), run.checkpoints()[0])
    with mh.load(mh.Run(without_template)) as dense, pytest.raises(ServeError, match="it has no chat template"):
        dense.generate([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (5, "it is of type int; give a text, a list of messages or a list of token ids"),
        (None, "it is of type NoneType"),
        ({"role": "user", "content": "x"}, r"it is a single message; give a list of messages: \[message\]"),
        ("half a character: \ud800", "lone surrogate"),
        ([{"role": "user"}], "messages.0: .*content is required"),
        ([{"role": "user", "content": None}], "messages.0: .*content is required"),
        ([{"role": "user", "content": 5}], "messages.0.content: "),
        ([{"content": "x"}], "messages.0.role: Field required"),
        ([[]], "it is an empty list; give at least one message or token"),
        ([1, "x"], "neither messages nor token ids"),
        ([-1], "other token ids than those of the model, 0 to 319"),
        ([320], "other token ids than those of the model, 0 to 319"),
    ],
)
def test_other_prompts_are_errors(model, prompt, message):
    with pytest.raises(ServeError, match=f"^the prompt: .*{message}"):
        model.generate(prompt)
    [single_prompt] = prompt if prompt == [[]] else [prompt]
    for function in (model.stream, model.encode):
        with pytest.raises(ServeError, match=f"^the prompt: .*{message}"):
            function(single_prompt)


def test_logits_are_those_of_a_text_or_tokens(model):
    for prompt in ([], [-1], [320], 5, {"role": "user"}, [{"role": "user", "content": "x"}]):
        with pytest.raises(ServeError, match=r"^the prompt: "):
            model.logits(prompt)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_missing_gpu_is_one_line(run):
    with pytest.raises(ServeError, match="device cuda: torch finds no GPU in this process"):
        mh.load(run, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_computes_the_same(run, model):
    with mh.load(run, device="cuda") as gpu_model:
        assert gpu_model.logits("the quick").is_cuda
        assert torch.allclose(gpu_model.logits("the quick").cpu(), model.logits("the quick"), atol=1e-3)
        greedy = {"max_tokens": 8, "temperature": 0}
        assert gpu_model.generate(PROMPTS, **greedy) == model.generate(PROMPTS, **greedy)


def test_a_failure_of_the_engine_is_an_error_for_the_user(run, monkeypatch):
    def fail(*_):
        raise MemoryError("all of it is taken")

    with mh.load(run) as model:
        monkeypatch.setattr(Sampler, "sample", fail)
        message = "^the engine: MemoryError: all of it is taken; try another checkpoint"
        with pytest.raises(ServeError, match=message):
            model.generate(PROMPTS)
        with pytest.raises(ServeError, match=message):
            list(model.stream("the quick"))


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name in ("answers", "engine")}


def test_a_closed_or_dropped_model_leaves_no_thread(run):
    other_threads = engine_threads()
    model = mh.load(run)
    assert engine_threads() == other_threads
    pieces = model.stream("the", max_tokens=60)
    next(pieces)
    assert len(engine_threads() - other_threads) == 2
    model.close()
    model.close()
    assert engine_threads() == other_threads
    # The rest of the answer is an error for the user, unless the engine was quick enough to compute all of it.
    errors = []
    try:
        list(pieces)
    except ServeError as e:
        errors.append(str(e))
    assert errors in ([], [f"model {model.name}: it is closed; load it again"])
    for function in (model.generate, model.logits):
        with pytest.raises(ServeError, match="it is closed"):
            function("the")
    pieces = mh.load(run).stream("the", max_tokens=3, temperature=0)
    # Only the stream refers to the model.
    gc.collect()
    assert len(list(pieces)) == 3
    del pieces
    gc.collect()
    assert engine_threads() == other_threads


def test_a_model_may_be_collected_in_any_thread(run):
    other_threads = engine_threads()
    models = [mh.load(run)]
    models[0].generate("the", max_tokens=1)
    collecting_thread = threading.Thread(target=models.clear)
    collecting_thread.start()
    collecting_thread.join()
    wait_until(lambda: engine_threads() == other_threads, "the end of the threads")


def test_weights_that_cannot_be_loaded_are_an_error_each_time(tmp_path):
    directory = make_run(tmp_path, MODELS["dense"])
    model = mh.load(mh.Run(directory))
    for file in (committed_checkpoints(directory)[0] / "weights").iterdir():
        file.unlink()
    other_threads = engine_threads()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="is not in it"):
            model.generate("the")
    wait_until(lambda: engine_threads() <= other_threads, "the end of the threads")
    model.close()
