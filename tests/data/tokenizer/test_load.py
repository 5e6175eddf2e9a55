import pytest
from tokenizers import Tokenizer

from mhmoe_ray.data.tokenizer import load_tokenizer, store_given_tokenizer
from mhmoe_ray.data.tokenizer.train import train_bpe
from mhmoe_ray.errors import DataError
from tests.data.tokenizer.words import BYTES
from tests.support.specs import tiny_spec

from .words import make_word_tokenizer


def test_load_tokenizer_rejects_a_tokenizer_without_boundaries(tmp_path):
    make_word_tokenizer("a", "</s>").save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"neither the token <\|endoftext\|> nor the two tokens <s> and </s>"):
        load_tokenizer(tmp_path / "t.json", 10)
    make_word_tokenizer("a", "<s>", "</s>").save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json", 3).get_vocab_size() == 3
    with pytest.raises(DataError, match="it has 3 entries"):
        load_tokenizer(tmp_path / "t.json", 2)


def test_load_tokenizer_ignores_truncation_and_padding(tmp_path):
    tokenizer = make_word_tokenizer("a", "<s>", "</s>")
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(tmp_path / "t.json"))
    loaded_tokenizer = load_tokenizer(tmp_path / "t.json", 3)
    assert loaded_tokenizer.encode(["a", "a"], is_pretokenized=True).ids == [0, 0]
    assert (loaded_tokenizer.truncation, loaded_tokenizer.padding) == (None, None)


def test_load_tokenizer_rejects_a_boundary_that_is_the_unknown_token(tmp_path):
    # The first token is the unknown token, so here it is <s>, the start of a document.
    make_word_tokenizer("<s>", "</s>", "a").save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match="give it a separate unknown token"):
        load_tokenizer(tmp_path / "t.json", 3)
    tokenizer = train_bpe(["a boat"], 300)
    # Like GPT-2's, this tokenizer knows all bytes and never produces its unknown token, so that token may be a
    # boundary.
    tokenizer.model.unk_token = "<|endoftext|>"
    tokenizer.save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json", 300).encode("\x00é").ids


def store_tokenizer(folder, content, vocab_size=300, **keys):
    """Store `content` as the tokenizer that a spec names, and return the path of the resulting tokenizer.json."""
    (folder / "given").write_bytes(content)
    spec = tiny_spec(folder, data={"tokenizer": "given", **keys})
    store_given_tokenizer(spec.data, vocab_size, folder / "tokenizer.json")
    return folder / "tokenizer.json"


def test_store_given_tokenizer_detects_the_format_by_content(tmp_path):
    content = make_word_tokenizer("a", "<s>", "</s>").to_str().encode()
    assert store_tokenizer(tmp_path, content).read_bytes() == content
    stored_path = store_tokenizer(tmp_path, BYTES, tokenizer_pattern="gpt2")
    loaded_tokenizer = Tokenizer.from_file(str(stored_path))
    assert (loaded_tokenizer.get_vocab_size(), loaded_tokenizer.token_to_id("<|endoftext|>")) == (257, 256)
    assert loaded_tokenizer.encode("aé").ids == list("aé".encode())


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        (BYTES, {}, "set data.tokenizer_pattern to gpt2, cl100k"),
        (BYTES, {"tokenizer_pattern": "(a"}, "data.tokenizer_pattern is no regular expression: .*parenthesis"),
        (BYTES, {"tokenizer_pattern": "gpt2", "vocab_size": 256}, "it has 257 entries"),
        (b'{"version": "1.0"}', {}, "use a tokenizer.json of the tokenizers library, or"),
        (b"", {}, "use a tokenizer.json"),
        (b"\x80\x00\xff", {}, "use a tokenizer.json"),
        (make_word_tokenizer("a", "<s>", "</s>").to_str().encode(), {"tokenizer_pattern": "gpt2"}, "would be ignored"),
        (BYTES + b"YWI 256", {"tokenizer_pattern": "gpt2"}, "line 257 is not of tiktoken's format"),
        (BYTES + b"YWI=256", {"tokenizer_pattern": "gpt2"}, "line 257 is not of tiktoken's format"),
        (BYTES + b"YWI= 257", {"tokenizer_pattern": "gpt2"}, "its 257 ranks are not 0 to 256"),
        (BYTES + b"YQ== 256", {"tokenizer_pattern": "gpt2"}, "line 257 repeats an earlier token"),
        (
            BYTES[BYTES.index(b"\n") + 1 :],
            {"tokenizer_pattern": "gpt2"},
            "it has no token for 1 of the 256 bytes, the first is 0",
        ),
    ],
)
def test_store_given_tokenizer_rejects_a_wrong_file_in_one_line(tmp_path, content, keys, message):
    with pytest.raises(DataError, match=message) as error:
        store_tokenizer(tmp_path, content, **keys)
    assert "\n" not in str(error.value)


def test_store_given_tokenizer_names_a_missing_file(tmp_path):
    spec = tiny_spec(tmp_path, data={"tokenizer": "gone"})
    with pytest.raises(DataError, match=r"tokenizer .*gone: No such file or directory; correct data\.tokenizer"):
        store_given_tokenizer(spec.data, 300, tmp_path / "tokenizer.json")
