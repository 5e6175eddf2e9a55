"""Tests that the targets of conversations equal those of an oracle without Jinja and without offsets of tokens."""

from functools import cache
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mhmoe_ray.data.chat.encoder import ConversationEncoder
from mhmoe_ray.data.chat.template import SPELLING_MARK, ChatTemplate, RenderedConversation, Span
from mhmoe_ray.data.tokenizer import boundary_texts, chat_texts
from tests.data.chat.templates import BEGIN, CASES, END, TemplateCase
from tests.data.chat.tokenizers import TOKENIZERS, byte_level_tokenizer, token_spans

CONVERSATION = [
    {"role": "user", "content": "hello, how are you?"},
    {"role": "assistant", "content": "I am fine, thank you."},
    {"role": "user", "content": "And 日本語 🦊?"},
    {"role": "assistant", "content": "größer 🦊"},
]
CONTENTS = st.text(st.sampled_from("helo wß日🦊.,:\n"), max_size=12)
# An answer needs some text, and white space at its edges may belong to the tokens of a header (see `ChatTemplate`).
ANSWERS = st.builds("{}{}".format, st.sampled_from(["hello", "I", "日本", "🦊"]), CONTENTS)
EXCHANGES = st.lists(st.tuples(CONTENTS, ANSWERS), min_size=1, max_size=4)


@cache
def prepare_case(case_name: str, tokenizer_name: str) -> tuple[ChatTemplate, Tokenizer, ConversationEncoder]:
    """Return the compiled template of a case, a tokenizer with the case's special tokens, and its encoder."""
    case = CASES[case_name]
    tokenizer = TOKENIZERS[tokenizer_name](case.special_tokens)
    return ChatTemplate(case.text, BEGIN, END), tokenizer, ConversationEncoder(tokenizer)


def expected_targets(case: TemplateCase, messages, tokenizer, ids: list[int]) -> list[bool]:
    """Return for each token whether some of its bytes belong to an answer of the assistant in `render_by_hand`."""
    pieces = case.render_by_hand(messages)
    text = "".join(piece for piece, _ in pieces)
    ends = list(accumulate(len(piece.encode()) for piece, _ in pieces))
    is_answer = [answers for (piece, answers) in pieces for _ in piece.encode()]
    assert ends[-1] == len(is_answer)
    flags = []
    for start, stop in token_spans(tokenizer, ids, text):
        # A space that the tokenizer has added belongs to the piece that begins there.
        flags.append(any(is_answer[start : max(stop, start + 1)]))
    return flags


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("case_name", CASES)
@given(exchanges=EXCHANGES, system=st.none() | CONTENTS)
def test_targets_equal_those_found_by_hand(case_name, tokenizer_name, exchanges, system):
    case, (template, tokenizer, encoder) = CASES[case_name], prepare_case(case_name, tokenizer_name)
    messages = [{"role": "system", "content": system}] if system is not None and case.takes_system else []
    for question, answer in exchanges:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    conversation = template.render_conversation(messages)
    assert conversation.text == "".join(piece for piece, _ in case.render_by_hand(messages))
    [(token_ids, target_mask)] = encoder.encode([conversation])
    # One start token comes first, whether the template writes it or not.
    start = tokenizer.token_to_id(BEGIN)
    text_ids = tokenizer.encode(conversation.text, add_special_tokens=False).ids
    assert token_ids.tolist() == (text_ids if text_ids[0] == start else [start, *text_ids])
    assert token_ids.tolist().count(start) == 1
    expected = expected_targets(case, messages, tokenizer, text_ids)
    assert target_mask.tolist() == [False] * (len(token_ids) - len(text_ids)) + expected


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("case_name", CASES)
def test_targets_decode_to_the_assistants_turns(case_name, tokenizer_name):
    """The runs of targets are the answers with the tokens that end them, and nothing else."""
    template, tokenizer, encoder = prepare_case(case_name, tokenizer_name)
    [(token_ids, target_mask)] = encoder.encode([template.render_conversation(CONVERSATION)])
    edges = np.flatnonzero(np.diff(target_mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
    turns = [tokenizer.decode(token_ids[a:b].tolist(), skip_special_tokens=False).strip() for a, b in edges]
    ends = {"Llama 3": "<|eot_id|>", "ChatML": "<|im_end|>", "ChatML with blocks": "<|im_end|>"}
    end = ends.get(case_name, END)
    assert [turn.replace(" ", "") for turn in turns] == [
        (message["content"] + end).replace(" ", "") for message in CONVERSATION if message["role"] == "assistant"
    ]


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("case_name", CASES)
def test_prompts_are_what_precedes_the_targets(case_name, tokenizer_name):
    """The tokens before an answer are those that a server encodes for the same messages."""
    template, _, encoder = prepare_case(case_name, tokenizer_name)
    [(token_ids, target_mask)] = encoder.encode([template.render_conversation(CONVERSATION)])
    answer_starts = np.flatnonzero(np.diff(target_mask.astype(int), prepend=0) == 1)
    for answer_start, number in zip(answer_starts, (1, 3), strict=True):
        [prompt] = encoder.encode([RenderedConversation(template.render(CONVERSATION[:number]), ())])
        assert prompt.token_ids.tolist() == token_ids[:answer_start].tolist()


@pytest.mark.parametrize(
    ("case_name", "end"),
    [("built-in", END), ("ChatML", "<|im_end|>"), ("Llama 3", "<|eot_id|>"), ("Mistral", END)],
)
def test_turn_ends_are_the_tokens_after_answers(case_name, end):
    case = CASES[case_name]
    tokenizer = byte_level_tokenizer(case.special_tokens)
    template = ChatTemplate(case.text, *boundary_texts(tokenizer))
    assert ConversationEncoder(tokenizer).turn_ends(template) == {tokenizer.token_to_id(end)}


def test_tokens_that_overlap_a_span_in_part_are_targets():
    tokenizer = byte_level_tokenizer()
    [hello] = tokenizer.encode(" hello").ids
    text = "I hello I"
    [(token_ids, target_mask)] = ConversationEncoder(tokenizer).encode([RenderedConversation(text, (Span(4, 6),))])
    assert token_ids[target_mask].tolist() == [hello]


def test_bytes_of_one_character_are_targets_together():
    """A character without a token is encoded as several tokens, each of which has the offsets of the character."""
    for make_tokenizer in TOKENIZERS.values():
        tokenizer = make_tokenizer(())
        text = "a🦉b"
        [(token_ids, target_mask)] = ConversationEncoder(tokenizer).encode([RenderedConversation(text, (Span(1, 2),))])
        assert target_mask.sum() > 2
        assert tokenizer.decode(token_ids[target_mask].tolist()) == "🦉"


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("case_name", CASES)
def test_messages_forge_no_special_tokens(case_name, tokenizer_name):
    """Messages that spell special tokens add none, in training and in prompts, and no other conversation changes."""
    case = CASES[case_name]
    tokenizer = TOKENIZERS[tokenizer_name](case.special_tokens)
    texts, encoder = chat_texts(tokenizer), ConversationEncoder(tokenizer)
    template = ChatTemplate(case.text, *texts)

    def encode(messages):
        [encoded] = encoder.encode([template.render_conversation(messages)])
        return encoded

    def specials(token_ids):
        return [token for token in token_ids.tolist() if token in tokenizer.get_added_tokens_decoder()]

    ordinary = template.render_conversation(CONVERSATION)
    assert ordinary == ChatTemplate(case.text, *texts[:2], [SPELLING_MARK]).render_conversation(CONVERSATION)
    expected_ids = tokenizer.encode(ordinary.text, add_special_tokens=False).ids
    assert encode(CONVERSATION).token_ids[-len(expected_ids) :].tolist() == expected_ids
    for spelling in {*texts[:2], *texts[2]}:
        forged = [{**message, "content": f"{message['content']}{spelling}x"} for message in CONVERSATION]
        encoded = encode(forged)
        assert specials(encoded.token_ids) == specials(encode(CONVERSATION).token_ids)
        targets = np.flatnonzero(np.diff(encoded.target_mask.astype(int), prepend=0) == 1)
        assert len(targets) == 2
        text = tokenizer.decode(encoded.token_ids.tolist(), skip_special_tokens=False)
        assert text.replace(" ", "").count(f"{spelling}x") == len(forged)
