import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhmoe_ray.serve.text import TextStream

from .conftest import TEXT, build_tokenizer

TOKENIZER = build_tokenizer()
SIZE = TOKENIZER.get_vocab_size()

# Any tokens at all (bytes that are no UTF-8 among them), and tokens of real text with several bytes a character.
any_ids = st.lists(st.integers(1, SIZE - 1), max_size=24)
text_ids = st.text(st.sampled_from(sorted({c for t in TEXT for c in t} | {"€", "é", "\ufffd"})), max_size=16).map(
    lambda text: TOKENIZER.encode(text).ids
)
stop_lists = st.lists(st.text(st.sampled_from("abt eo日🦊\ufffd"), min_size=1, max_size=4), max_size=3)


def push_all(ids, stops):
    stream, pieces = TextStream(TOKENIZER, stops), []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream.stopped


def oracle(ids, stops):
    """The answer from whole texts only: that of the fewest tokens which surely hold a stop string, cut before it."""
    for n in range(1, len(ids) + 1):
        whole = TOKENIZER.decode(ids[:n])
        sure = whole if n == len(ids) else whole.removesuffix("\ufffd")
        starts = [sure.find(s) for s in stops if s in sure]
        if starts:
            return sure[: min(starts)], True
    return TOKENIZER.decode(ids), False


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(any_ids, text_ids), stop_lists)
def test_pieces_join_to_the_plain_answer(ids, stops):
    pieces, stopped = push_all(ids, stops)
    assert ("".join(pieces), stopped) == oracle(ids, stops)


@settings(max_examples=300)
@given(st.one_of(any_ids, text_ids))
def test_what_is_sent_is_never_taken_back(ids):
    """However early the tokens of a text end, what has been sent is the beginning of that text."""
    whole = TOKENIZER.decode(ids)
    for n in range(len(ids) + 1):
        pieces, _ = push_all(ids[:n], [])
        assert whole.startswith("".join(pieces[:-1]))


def test_a_character_of_several_tokens_comes_at_once():
    ids = TOKENIZER.encode("🧭").ids
    assert len(ids) > 1
    assert push_all(ids, []) == ([*[""] * (len(ids) - 1), "🧭", ""], False)


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
def test_stop_strings(text, stops, expected):
    ids = TOKENIZER.encode(text).ids
    pieces, stopped = push_all(ids, stops)
    assert "".join(pieces) == expected
    assert stopped == (expected != text)
