"""Tests of exported tokenizers: transformers encodes a text to the same tokens as `mhmoe generate`."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mhmoe_ray.checkpoint.huggingface.tokenizer import add_start_token, tokenizer_config
from mhmoe_ray.checkpoint.manifest import newest_checkpoint
from mhmoe_ray.data.tokenizer import boundaries
from mhmoe_ray.serve.engine import SamplingParams
from mhmoe_ray.serve.load import load_answerer
from mhmoe_ray.spec import ServeSpec
from tests.checkpoint.huggingface.conftest import MIXTRAL, TEXT, export_run, make_run
from tests.llama_tokenizer import llama_tokenizer
from tests.serve.asking import answer_tokens

TEXTS = ["the quick brown fox", "", " fox 日本 🦊\n"]


def byte_level(post_processor):
    """Return a byte-level BPE tokenizer trained on `TEXT`, with this post-processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = post_processor
    return tokenizer


def template(single, token, number):
    """Return a post-processor that adds the special token with id `number` as the template `single` says."""
    return processors.TemplateProcessing(single=single, special_tokens=[(token, number)])


TOKENIZERS = {
    "llama": llama_tokenizer(TEXT, 320),
    "bytes": byte_level(processors.ByteLevel(trim_offsets=False)),
    "bytes and the start": byte_level(
        processors.Sequence([processors.ByteLevel(), template("<|endoftext|> $A", "<|endoftext|>", 0)])
    ),
    "an end too": byte_level(template("$A <|endoftext|>", "<|endoftext|>", 0)),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_exported_tokenizer_adds_the_start_token(tmp_path, kind):
    from transformers import AutoTokenizer

    tokenizer = TOKENIZERS[kind]
    content = tokenizer.to_str(pretty=True).encode()
    changed_content = add_start_token(content)
    assert add_start_token(changed_content) == changed_content
    assert (changed_content == content) == (kind == "bytes and the start")
    (tmp_path / "tokenizer.json").write_bytes(changed_content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(changed_content, 64)))
    hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    start = boundaries(tokenizer).start
    for text in TEXTS:
        expected = [start, *tokenizer.encode(text, add_special_tokens=False).ids]
        assert hf_tokenizer(text).input_ids == expected
        assert hf_tokenizer.decode(expected, skip_special_tokens=True) == tokenizer.decode(expected)
    assert hf_tokenizer.bos_token_id == start
    assert hf_tokenizer.eos_token_id in boundaries(tokenizer).ends
    assert hf_tokenizer.pad_token_id is not None
    assert hf_tokenizer.model_max_length == 64
    assert hf_tokenizer(TEXTS, padding=True).attention_mask[1].count(1) == 1


def test_transformers_answers_like_the_engine(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = make_run(tmp_path, MIXTRAL)
    export_run(run, tmp_path / "out")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    answerer = load_answerer(newest_checkpoint(run, ("weights",))[0], ServeSpec(max_concurrency=1))
    vocab_size = answerer.tokenizer.get_vocab_size()
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt")
        ids = answerer.encode(text)
        assert inputs.input_ids[0].tolist() == ids
        generated_tokens = model.generate(
            **inputs, max_new_tokens=16, do_sample=False, suppress_tokens=list(range(vocab_size, 320))
        )
        expected = generated_tokens[0, len(ids) :].tolist()
        answer = answer_tokens(answerer.engine, ids, SamplingParams(16, temperature=0))
        assert answer == [token for token in expected if token not in (1, 2)]
    assert torch.equal(
        tokenizer(["fox", "the fox"], padding=True, return_tensors="pt").attention_mask[:, 0], torch.ones(2)
    )
