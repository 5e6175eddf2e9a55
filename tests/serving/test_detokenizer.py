import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhmoe_ray.serving.detokenizer import TextDecoder, TextStream
from tests.serving.conftest import TEXT
from tests.serving.tokenizers import DECODERS, LLAMA, TOKENIZER, TOKENIZERS

SIZES = {kind: tokenizer.get_vocab_size() for kind, tokenizer in TOKENIZERS.items()}
kinds = st.sampled_from(sorted(DECODERS))

texts = st.text(st.sampled_from(sorted({c for t in TEXT for c in t} | {"€", "é", "\ufffd"})), max_size=60)


@st.composite
def answers(draw):
    """Draw a decoder, and either arbitrary tokens, which may be invalid UTF-8, or the tokens of a real text."""
    kind = draw(kinds)
    tokenizer = TOKENIZERS[kind]
    any_ids = st.lists(st.integers(1, SIZES[kind] - 1), max_size=80)  # more tokens than a stream keeps
    return DECODERS[kind], draw(st.one_of(any_ids, texts.map(lambda text: tokenizer.encode(text).ids)))


stop_lists = st.lists(st.text(st.sampled_from("abt eo日🦊\ufffd"), min_size=1, max_size=4), max_size=3)


def push_all(ids, stop_strings, decode=DECODERS["bytes"], prompt=()):
    """Push tokens to a text stream up to a stop string; return its pieces, and whether a stop string ended it."""
    stream, pieces = TextStream(decode, stop_strings, prompt), []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.is_stopped:
            break
    return [*pieces, stream.finish()], stream.is_stopped


def expected_answer(ids, stop_strings, decode):
    """Return the text of an answer, and whether a stop string ended it, computed from the texts of all its prefixes.

    The text is that of the fewest tokens that certainly contain a stop string, cut before that string.
    """
    for n in range(1, len(ids) + 1):
        text = decode(ids[:n])
        certain_text = text if n == len(ids) else text.removesuffix("\ufffd")
        starts = [certain_text.find(s) for s in stop_strings if s in certain_text]
        if starts:
            return certain_text[: min(starts)], True
    return decode(ids), False


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(answers(), stop_lists)
def test_pieces_join_to_the_full_text(answer, stop_strings):
    decode, ids = answer
    pieces, is_stopped = push_all(ids, stop_strings, decode)
    assert ("".join(pieces), is_stopped) == expected_answer(ids, stop_strings, decode)


@settings(max_examples=300)
@given(answers())
def test_sent_text_is_a_prefix_of_the_answer(answer):
    """The text that has been sent is a prefix of the answer after each token."""
    decode, ids = answer
    full_text = decode(ids)
    for n in range(len(ids) + 1):
        pieces, _ = push_all(ids[:n], [], decode)
        assert full_text.startswith("".join(pieces[:-1]))


@settings(max_examples=200)
@given(texts)
def test_decoder_equals_the_library_for_complete_characters(text):
    for kind, tokenizer in TOKENIZERS.items():
        decode = DECODERS[kind]
        ids = tokenizer.encode(text).ids
        assert decode(ids) == tokenizer.decode(ids) == text


@settings(max_examples=200)
@given(texts.map(lambda text: text.replace("\ufffd", "")), st.integers(0, 16))
def test_answer_continues_the_prompt(text, cut):
    """Prompt and answer join to the text wherever it is cut, also in front of a space."""
    for kind, tokenizer in TOKENIZERS.items():
        decode = DECODERS[kind]
        ids = tokenizer.encode(text).ids
        while "\ufffd" in decode(ids[:cut]):  # the prompt has to end with a whole character
            cut += 1
        pieces, _ = push_all(ids[cut:], [], decode, ids[:cut])
        assert decode(ids[:cut]) + "".join(pieces) == text


def test_leading_space_is_kept_after_a_prompt():
    begin, *ids = LLAMA.token_to_id("<s>"), *LLAMA.encode("the fox jumps").ids
    start = next(i for i, t in enumerate(ids) if i and LLAMA.id_to_token(t).startswith("▁"))
    prompt, answer = ids[:start], ids[start:]
    assert "".join(push_all(answer, [], DECODERS["fallback"], [begin, *prompt])[0]) == " fox jumps"
    assert "".join(push_all(answer, [], DECODERS["fallback"], [begin])[0]) == "fox jumps"


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_multi_token_character_arrives_at_once(tokenizer):
    """A character of several tokens is sent whole with its last token, also if another such character follows.

    With byte fallback, the library's decoder would replace it as long as the next character is incomplete.
    """
    ids = tokenizer.encode("🧭🧭🧭").ids
    pieces, _ = push_all(ids, [], TextDecoder(tokenizer))
    assert [p for p in pieces if p] == ["🧭", "🧭", "🧭"]
    assert len(ids) > 3


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("one\ntwo", ["\n\n"], "one\ntwo"),
        ("one\n", ["\n\n"], "one\n"),
        ("stop", ["stop"], ""),
        ("a b c", ["c", "b"], "a "),
        ("aab", ["ab"], "a"),
        ("xba", ["a", "ba"], "x"),
    ],
)
def test_stop_strings_end_the_text(text, stops, expected):
    ids = TOKENIZER.encode(text).ids
    pieces, is_stopped = push_all(ids, stops)
    assert "".join(pieces) == expected
    assert is_stopped == (expected != text)
