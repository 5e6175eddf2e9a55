import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhmoe_ray.data.tokenizer.train import train_unigram
from mhmoe_ray.serve.detokenizer import TextDecoder, TextStream
from tests.llama_tokenizer import llama_tokenizer
from tests.serve.conftest import TEXT, build_tokenizer

TOKENIZER = build_tokenizer()
UNIGRAM = train_unigram(TEXT * 2, 330)
LLAMA = llama_tokenizer(TEXT[:2] * 4, 320)  # its vocabulary lacks Japanese and foxes, which become bytes
TOKENIZERS = {"bytes": TOKENIZER, "unigram": UNIGRAM, "fallback": LLAMA}
DECODERS = {kind: TextDecoder(tokenizer) for kind, tokenizer in TOKENIZERS.items()}
SIZES = {kind: tokenizer.get_vocab_size() for kind, tokenizer in TOKENIZERS.items()}
kinds = st.sampled_from(sorted(DECODERS))

texts = st.text(st.sampled_from(sorted({c for t in TEXT for c in t} | {"€", "é", "\ufffd"})), max_size=60)


@st.composite
def answers(draw):
    """Draw a decoder, and any tokens at all (bytes that are no UTF-8 among them) or the tokens of a real text."""
    kind = draw(kinds)
    tokenizer = TOKENIZERS[kind]
    any_ids = st.lists(st.integers(1, SIZES[kind] - 1), max_size=80)  # more than a stream keeps
    return DECODERS[kind], draw(st.one_of(any_ids, texts.map(lambda text: tokenizer.encode(text).ids)))


stop_lists = st.lists(st.text(st.sampled_from("abt eo日🦊\ufffd"), min_size=1, max_size=4), max_size=3)


def push_all(ids, stops, decode=DECODERS["bytes"], prompt=()):
    stream, pieces = TextStream(decode, stops, prompt), []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream.stopped


def oracle(ids, stops, decode):
    """Return the answer computed from whole texts, and whether it holds a stop string.

    It is the text of the fewest tokens that surely hold a stop string, cut before that string.
    """
    for n in range(1, len(ids) + 1):
        whole = decode(ids[:n])
        sure = whole if n == len(ids) else whole.removesuffix("\ufffd")
        starts = [sure.find(s) for s in stops if s in sure]
        if starts:
            return sure[: min(starts)], True
    return decode(ids), False


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(answers(), stop_lists)
def test_pieces_join_to_the_plain_answer(answer, stops):
    decode, ids = answer
    pieces, stopped = push_all(ids, stops, decode)
    assert ("".join(pieces), stopped) == oracle(ids, stops, decode)


@settings(max_examples=300)
@given(answers())
def test_what_is_sent_is_never_taken_back(answer):
    """Text that has been sent is the beginning of the answer, however early the tokens end."""
    decode, ids = answer
    whole = decode(ids)
    for n in range(len(ids) + 1):
        pieces, _ = push_all(ids[:n], [], decode)
        assert whole.startswith("".join(pieces[:-1]))


@settings(max_examples=200)
@given(texts)
def test_whole_characters_are_decoded_as_the_library_does(text):
    for kind, tokenizer in TOKENIZERS.items():
        decode = DECODERS[kind]
        ids = tokenizer.encode(text).ids
        assert decode(ids) == tokenizer.decode(ids) == text


@settings(max_examples=200)
@given(texts.map(lambda text: text.replace("\ufffd", "")), st.integers(0, 16))
def test_an_answer_goes_on_where_the_prompt_ends(text, cut):
    """Prompt and answer join to the text however it is cut into the two, in front of a space too."""
    for kind, tokenizer in TOKENIZERS.items():
        decode = DECODERS[kind]
        ids = tokenizer.encode(text).ids
        while "\ufffd" in decode(ids[:cut]):  # prompts end with a whole character
            cut += 1
        pieces, _ = push_all(ids[cut:], [], decode, ids[:cut])
        assert decode(ids[:cut]) + "".join(pieces) == text


def test_a_first_space_stays_where_there_was_a_prompt():
    begin, *ids = LLAMA.token_to_id("<s>"), *LLAMA.encode("the fox jumps").ids
    at = next(i for i, t in enumerate(ids) if i and LLAMA.id_to_token(t).startswith("▁"))
    prompt, answer = ids[:at], ids[at:]
    assert "".join(push_all(answer, [], DECODERS["fallback"], [begin, *prompt])[0]) == " fox jumps"
    assert "".join(push_all(answer, [], DECODERS["fallback"], [begin])[0]) == "fox jumps"


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_a_character_of_several_tokens_comes_at_once(tokenizer):
    """A character also comes at once after others of its kind, which byte fallback would spoil while the next is
    cut."""
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
def test_stop_strings(text, stops, expected):
    ids = TOKENIZER.encode(text).ids
    pieces, stopped = push_all(ids, stops)
    assert "".join(pieces) == expected
    assert stopped == (expected != text)
