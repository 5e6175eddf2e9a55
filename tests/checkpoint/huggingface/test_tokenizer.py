"""Tests of exported tokenizers: transformers encodes a text to the same tokens as `mhmoe generate`."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mhmoe_ray.checkpoint.huggingface.import_ import import_folder
from mhmoe_ray.checkpoint.huggingface.tokenizer import add_start_token, special_token, tokenizer_config
from mhmoe_ray.checkpoint.manifest import newest_checkpoint
from mhmoe_ray.data.tokenizer import boundaries
from mhmoe_ray.errors import CheckpointError, DataError
from mhmoe_ray.serving.engine import SamplingParams
from mhmoe_ray.serving.load import load_answerer
from mhmoe_ray.spec import ServeSpec
from tests.checkpoint.huggingface.conftest import MIXTRAL, TEXT, edit_config, export_run, make_run
from tests.serving.asking import answer_tokens
from tests.support.llama_tokenizer import llama_tokenizer

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
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(tokenizer, boundaries(tokenizer), 64)))
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
        answer = answer_tokens(answerer.engine, ids, SamplingParams(max_tokens=16, temperature=0))
        assert answer == [token for token in expected if token not in (1, 2)]
    assert torch.equal(
        tokenizer(["fox", "the fox"], padding=True, return_tensors="pt").attention_mask[:, 0], torch.ones(2)
    )


def word_tokenizer(special_tokens, post_processor=None):
    """Return a tokenizer of whole words with these special tokens, the last of which is the unknown one."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=special_tokens[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXT, trainers.WordLevelTrainer(special_tokens=special_tokens))
    if post_processor:
        tokenizer.post_processor = post_processor
    return tokenizer


FOREIGN_TOKENIZERS = {
    # As in Qwen: there is a token that ends a document, and nothing is added before a text.
    "nothing is added": (
        word_tokenizer(["<|endoftext|>", "<|im_end|>", "[UNK]"]),
        {"eos_token": "<|im_end|>", "add_bos_token": False},
        ("<|endoftext|>", False, ["<|im_end|>"]),
    ),
    # As in Llama 3: a post-processor adds a token of an unusual name.
    "a post-processor adds a token": (
        word_tokenizer(["<|begin|>", "<|eot|>", "[UNK]"], post_processor=template("<|begin|> $A", "<|begin|>", 0)),
        {"bos_token": "<|begin|>", "eos_token": {"content": "<|eot|>"}},
        ("<|begin|>", True, ["<|eot|>"]),
    ),
    "only tokenizer_config.json names tokens": (
        word_tokenizer(["[BOS]", "[EOS]", "[UNK]"]),
        {"bos_token": "[BOS]", "eos_token": "[EOS]", "add_bos_token": True},
        ("[BOS]", True, ["[EOS]"]),
    ),
    "there is only an end": (
        word_tokenizer(["[END]", "[UNK]"]),
        {"eos_token": "[END]"},
        ("[END]", False, []),
    ),
}


@pytest.mark.parametrize("case", FOREIGN_TOKENIZERS)
def test_imported_tokenizer_may_have_any_special_tokens(tmp_path, mixtral, case):
    """Prompts begin with a start token only if the model's own tokenizer adds one, also after another export."""
    from transformers import AutoTokenizer

    tokenizer, settings, (start, adds_start, ends) = FOREIGN_TOKENIZERS[case]
    mixtral.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "generation_config.json").unlink()
    edit_config(eos_token_id=None)(tmp_path / "theirs")
    tokenizer.save(str(tmp_path / "theirs" / "tokenizer.json"))
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(settings))
    first_run = import_folder(tmp_path / "theirs", None, tmp_path / "runs", None)
    export_run(first_run, tmp_path / "ours")
    second_run = import_folder(tmp_path / "ours", None, tmp_path / "runs", None)
    text = "the quick fox"
    text_ids = tokenizer.encode(text, add_special_tokens=False).ids
    start_ids = [tokenizer.token_to_id(start)]
    expected = start_ids + text_ids if adds_start else text_ids
    for run in (first_run, second_run):
        checkpoint, manifest, _ = newest_checkpoint(run, ("weights",))
        assert manifest.adds_start == adds_start
        assert manifest.ends == [tokenizer.token_to_id(end) for end in ends]
        answerer = load_answerer(checkpoint, ServeSpec(max_concurrency=1))
        assert answerer.encode(text) == expected
        assert answerer.encode("") == start_ids
        answerer.engine.close()
    exported_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert exported_tokenizer(text).input_ids == expected


def test_tokenizer_without_any_special_token_is_refused(tmp_path, mixtral):
    mixtral.save_pretrained(tmp_path / "theirs")
    word_tokenizer(["[UNK]"]).save(str(tmp_path / "theirs" / "tokenizer.json"))
    with pytest.raises(DataError, match="its post-processor adds no start token"):
        import_folder(tmp_path / "theirs", None, tmp_path / "runs", None)


def test_tokenizer_with_one_changed_merge_is_refused(tmp_path):
    export_run(make_run(tmp_path, MIXTRAL), tmp_path / "out")
    file = tmp_path / "out" / "tokenizer.json"
    content = json.loads(file.read_text())
    merges = content["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"its tokenizer\.json is not the one the model was trained with"):
        import_folder(tmp_path / "out", None, tmp_path / "runs", None)


def test_half_of_a_surrogate_pair_names_no_token():
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0}))
    settings = {"eos_token": "\ud800", "sep_token": {"content": "</s>"}}
    assert special_token(tokenizer, settings, "eos_token") is None
    assert special_token(tokenizer, settings, "eos_token", "sep_token") == 0
