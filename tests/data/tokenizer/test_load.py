import base64

import pytest
from tokenizers import Tokenizer

from mhmoe_ray.data.tokenizer import load_tokenizer, store_given
from mhmoe_ray.data.tokenizer.train import train_bpe
from mhmoe_ray.errors import DataError
from tests.specs import tiny_spec

from .words import words

BYTES = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


def test_a_tokenizer_of_neither_kind_is_refused_with_both_named(tmp_path):
    words("a", "</s>").save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"neither the token <\|endoftext\|> nor the two tokens <s> and </s>"):
        load_tokenizer(tmp_path / "t.json", 10)
    words("a", "<s>", "</s>").save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json", 3).get_vocab_size() == 3
    with pytest.raises(DataError, match="it has 3 entries"):
        load_tokenizer(tmp_path / "t.json", 2)


def test_what_a_file_says_of_cutting_and_padding_is_not_done(tmp_path):
    made = words("a", "<s>", "</s>")
    made.enable_truncation(1)
    made.enable_padding(length=4)
    made.save(str(tmp_path / "t.json"))
    loaded = load_tokenizer(tmp_path / "t.json", 3)
    assert loaded.encode(["a", "a"], is_pretokenized=True).ids == [0, 0]
    assert (loaded.truncation, loaded.padding) == (None, None)


def test_a_token_at_the_edge_of_documents_stands_for_nothing_else(tmp_path):
    words("<s>", "</s>", "a").save(str(tmp_path / "t.json"))  # the first is the unknown one
    with pytest.raises(DataError, match="give it an unknown token of its own"):
        load_tokenizer(tmp_path / "t.json", 3)
    made = train_bpe(["a boat"], 300)
    made.model.unk_token = "<|endoftext|>"  # as some of GPT-2's kind, which know all bytes
    made.save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json", 300).encode("\x00é").ids


def store(folder, content, vocab_size=300, **keys):
    (folder / "given").write_bytes(content)
    spec = tiny_spec(folder, data={"tokenizer": "given", **keys})
    store_given(spec.data, vocab_size, folder / "tokenizer.json")
    return folder / "tokenizer.json"


def test_the_format_is_told_by_content(tmp_path):
    content = words("a", "<s>", "</s>").to_str().encode()
    assert store(tmp_path, content).read_bytes() == content
    stored = store(tmp_path, BYTES, tokenizer_pattern="gpt2")
    loaded = Tokenizer.from_file(str(stored))
    assert (loaded.get_vocab_size(), loaded.token_to_id("<|endoftext|>")) == (257, 256)
    assert loaded.encode("aé").ids == list("aé".encode())


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        (BYTES, {}, "set data.tokenizer_pattern to gpt2, cl100k"),
        (BYTES, {"tokenizer_pattern": "(a"}, "data.tokenizer_pattern is no regular expression: .*parenthesis"),
        (BYTES, {"tokenizer_pattern": "gpt2", "vocab_size": 256}, "it has 257 entries"),
        (b'{"version": "1.0"}', {}, "use a tokenizer.json of the tokenizers library, or"),
        (b"", {}, "use a tokenizer.json"),
        (b"\x80\x00\xff", {}, "use a tokenizer.json"),
        (words("a", "<s>", "</s>").to_str().encode(), {"tokenizer_pattern": "gpt2"}, "would be ignored"),
        (BYTES + b"YWI 256", {"tokenizer_pattern": "gpt2"}, "line 257 is not of tiktoken's format"),
        (BYTES + b"YWI=256", {"tokenizer_pattern": "gpt2"}, "line 257 is not of tiktoken's format"),
        (BYTES + b"YWI= 257", {"tokenizer_pattern": "gpt2"}, "its 257 ranks are not 0 to 256"),
        (BYTES + b"YQ== 256", {"tokenizer_pattern": "gpt2"}, "line 257 has a token that was there before"),
        (
            BYTES[BYTES.index(b"\n") + 1 :],
            {"tokenizer_pattern": "gpt2"},
            "it has no token for 1 of the 256 bytes, the first is 0",
        ),
    ],
)
def test_a_file_of_no_use_is_refused_in_one_line(tmp_path, content, keys, message):
    with pytest.raises(DataError, match=message) as raised:
        store(tmp_path, content, **keys)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    spec = tiny_spec(tmp_path, data={"tokenizer": "gone"})
    with pytest.raises(DataError, match=r"tokenizer .*gone: No such file or directory; correct data\.tokenizer"):
        store_given(spec.data, 300, tmp_path / "tokenizer.json")
