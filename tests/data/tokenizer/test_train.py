import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings

from mhmoe_ray.data.tokenizer import DocumentEncoder
from mhmoe_ray.data.tokenizer.train import MAX_WORD_BYTES, train_bpe, train_unigram
from tests.data.tokenizer.texts import training_corpus

from .texts import SCRIPTS, any_text

TRAIN_FUNCTIONS = {"bpe": train_bpe, "unigram": train_unigram}
TOKENIZERS = {name: train(SCRIPTS * 3, 340) for name, train in TRAIN_FUNCTIONS.items()}
ENCODERS = {name: DocumentEncoder(tokenizer) for name, tokenizer in TOKENIZERS.items()}


@pytest.mark.parametrize("kind", TRAIN_FUNCTIONS)
@settings(max_examples=400)
@given(text=any_text)
def test_trained_tokenizer_decodes_any_text(kind, text):
    [ids] = ENCODERS[kind].encode([text])
    assert TOKENIZERS[kind].decode(ids) == text
    assert TOKENIZERS[kind].decode(ids[1:], skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", TRAIN_FUNCTIONS)
def test_training_makes_a_vocabulary_of_the_given_size_with_all_bytes(kind):
    assert TOKENIZERS[kind].get_vocab_size() == 340
    assert [TRAIN_FUNCTIONS[kind](SCRIPTS * 3, size).get_vocab_size() for size in (300, 257, 5)] == [300, 257, 257]
    empty_tokenizer = TRAIN_FUNCTIONS[kind]([], 300)
    [ids] = DocumentEncoder(empty_tokenizer).encode(["né <|endoftext|>"])
    assert len(ids) == 1 + len("né <|endoftext|>".encode())
    assert empty_tokenizer.decode(ids) == "né <|endoftext|>"


@pytest.mark.parametrize("kind", TRAIN_FUNCTIONS)
def test_training_makes_tokens_of_frequent_words(kind):
    tokenizer = TRAIN_FUNCTIONS[kind](["the moon rises over the quiet sea"] * 50 + SCRIPTS, 400)
    assert len(tokenizer.encode("the moon rises over the quiet sea").ids) <= 9


@pytest.mark.parametrize("kind", TRAIN_FUNCTIONS)
def test_training_cuts_a_long_run_without_breaks(kind):
    """Training cuts words of more than `MAX_WORD_BYTES` bytes; the trained tokenizer does not."""
    # Without the cut, training would take minutes, because its time grows with the square of the length of a run.
    run = "ACGT" * 50_000
    tokenizer = TRAIN_FUNCTIONS[kind]([f"the moon {run}", "A" * 5000], 300)
    assert max(map(len, tokenizer.get_vocab())) <= MAX_WORD_BYTES
    assert tokenizer.decode(tokenizer.encode(run).ids) == run
    assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(run)] == [run]


TRAINING_SCRIPT = """
import hashlib, sys
from mhmoe_ray.data.tokenizer.train import train_bpe, train_unigram
from tests.data.tokenizer.texts import training_corpus
train = {"bpe": train_bpe, "unigram": train_unigram}[sys.argv[1]]
print(hashlib.sha256(train(training_corpus(), 700).to_str().encode()).hexdigest())
"""


@pytest.mark.parametrize("kind", TRAIN_FUNCTIONS)
def test_training_is_the_same_for_any_number_of_threads(kind):
    digests = {hashlib.sha256(TRAIN_FUNCTIONS[kind](training_corpus(), 700).to_str().encode()).hexdigest()}
    for variables in ({"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}, {"RAYON_NUM_THREADS": "5"}):
        environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), **variables}
        process = subprocess.run(
            [sys.executable, "-c", TRAINING_SCRIPT, kind], env=environment, stdout=subprocess.PIPE, check=True
        )
        digests.add(process.stdout.decode().strip())
    assert len(digests) == 1
