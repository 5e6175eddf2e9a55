import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings

from mhmoe_ray.data.tokenizer import DocumentEncoder
from mhmoe_ray.data.tokenizer.train import MAX_WORD, train_bpe, train_unigram

from .texts import SCRIPTS, texts

TRAIN = {"bpe": train_bpe, "unigram": train_unigram}
MADE = {name: train(SCRIPTS * 3, 340) for name, train in TRAIN.items()}
ENCODERS = {name: DocumentEncoder(made) for name, made in MADE.items()}


@pytest.mark.parametrize("kind", TRAIN)
@settings(max_examples=400)
@given(text=texts)
def test_any_text_comes_back(kind, text):
    [ids] = ENCODERS[kind].encode([text])
    assert MADE[kind].decode(ids) == text
    assert MADE[kind].decode(ids[1:], skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", TRAIN)
def test_a_vocabulary_is_as_large_as_asked_and_never_lacks_a_byte(kind):
    assert MADE[kind].get_vocab_size() == 340
    assert [TRAIN[kind](SCRIPTS * 3, size).get_vocab_size() for size in (300, 257, 5)] == [300, 257, 257]
    empty = TRAIN[kind]([], 300)
    [ids] = DocumentEncoder(empty).encode(["né <|endoftext|>"])
    assert len(ids) == 1 + len("né <|endoftext|>".encode())
    assert empty.decode(ids) == "né <|endoftext|>"


@pytest.mark.parametrize("kind", TRAIN)
def test_frequent_words_become_one_token(kind):
    made = TRAIN[kind](["the moon rises over the quiet sea"] * 50 + SCRIPTS, 400)
    assert len(made.encode("the moon rises over the quiet sea").ids) <= 9


@pytest.mark.parametrize("kind", TRAIN)
def test_a_run_without_a_break_is_cut_and_spoils_neither_time_nor_vocabulary(kind):
    """Training over the run's whole length would take time that grows as its square: minutes."""
    run = "ACGT" * 50_000
    made = TRAIN[kind]([f"the moon {run}", "A" * 5000], 300)
    assert max(map(len, made.get_vocab())) <= MAX_WORD
    assert made.decode(made.encode(run).ids) == run
    # Each is as one word to it, when it has been trained.
    assert [word for word, _ in made.pre_tokenizer.pre_tokenize_str(run)] == [run]


ONCE = """
import hashlib, sys
from mhmoe_ray.data.tokenizer.train import train_bpe, train_unigram
from tests.data.tokenizer.test_train import corpus
train = {"bpe": train_bpe, "unigram": train_unigram}[sys.argv[1]]
print(hashlib.sha256(train(corpus(), 700).to_str().encode()).hexdigest())
"""


def corpus():
    """Return this package's own code, and texts in many scripts."""
    return [path.read_text() for path in sorted(Path("mhmoe_ray/data").rglob("*.py"))][:12] + SCRIPTS


@pytest.mark.parametrize("kind", TRAIN)
def test_the_result_is_the_same_in_any_process_on_any_number_of_threads(kind):
    found = {hashlib.sha256(TRAIN[kind](corpus(), 700).to_str().encode()).hexdigest()}
    for variables in ({"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}, {"RAYON_NUM_THREADS": "5"}):
        environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), **variables}
        done = subprocess.run([sys.executable, "-c", ONCE, kind], env=environment, stdout=subprocess.PIPE, check=True)
        found.add(done.stdout.decode().strip())
    assert len(found) == 1
