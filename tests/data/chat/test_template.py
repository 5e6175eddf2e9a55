"""Tests of chat templates for training: the spans of the assistant's turns, and templates that cannot be used."""

import pickle
from itertools import pairwise

import pytest

from mhmoe_ray.data.chat.encoder import ConversationEncoder
from mhmoe_ray.data.chat.process import ChatTemplateError
from mhmoe_ray.data.chat.template import (
    BUILT_IN_TEMPLATE,
    EXCHANGES,
    ChatTemplate,
    check_template,
    read_template,
)
from mhmoe_ray.errors import DataError
from tests.data.chat.templates import BEGIN, CASES, CHAT_ML, CHAT_ML_WITH_BLOCKS, END
from tests.data.chat.tokenizers import byte_level_tokenizer, sentence_tokenizer
from tests.support.specs import tiny_spec

STRIPPING = """\
{% for message in messages %}{% if message.role == 'user' %}U:{{ message.content }};{% else %}A:\
{{ message.content if loop.last else message.content[:1] }}{{ eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}A:{% endif %}"""
"""Template that shortens all answers but the last one, as templates of reasoning models do with thoughts."""


def marked(text: str, spans) -> str:
    """Return a text with brackets around its spans."""
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    return "".join(f"[{text[a:b]}]" if i % 2 else text[a:b] for i, (a, b) in enumerate(pairwise(edges)))


def test_built_in_template_is_read_as_a_dialogue():
    template = ChatTemplate(BUILT_IN_TEMPLATE, BEGIN, END)
    messages = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "Hi!\n"},
        {"role": "assistant", "content": "  Hello.\n"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Bye."},
    ]
    expected = "System:\nBe brief.\nUser:\nHi!\nAssistant:\n[Hello.</s>]User:\nAnd?\nAssistant:\n[Bye.</s>]"
    conversation = template.render_conversation(messages)
    assert marked(*conversation) == expected
    assert template.render(messages[:2]) == expected[: expected.index("[")]
    assert template.render(messages[:4]) == conversation.text[: conversation.spans[1].start]
    with pytest.raises(ChatTemplateError, match="a role is system, user or assistant, not tool"):
        template.render([{"role": "tool", "content": "1"}])


def test_generation_blocks_mark_what_they_do_in_transformers():
    """The targets are the tokens that transformers marks as the assistant's."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = byte_level_tokenizer(CASES["ChatML"].special_tokens)
    reference_tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END)
    for text in (BUILT_IN_TEMPLATE, CHAT_ML_WITH_BLOCKS):
        expected = reference_tokenizer.apply_chat_template(
            EXCHANGES, chat_template=text, return_assistant_tokens_mask=True, return_dict=True
        )
        conversation = ChatTemplate(text, BEGIN, END).render_conversation(EXCHANGES)
        [(token_ids, target_mask)] = ConversationEncoder(tokenizer).encode([conversation])
        assert token_ids[1:].tolist() == expected["input_ids"]
        assert target_mask[1:].tolist() == list(map(bool, expected["assistant_masks"]))


def test_generation_blocks_may_stand_anywhere_where_text_is_printed():
    text = (
        "{% macro say(m) %}{% generation %}{{ m.content }};{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ say(m) }}{% else %}{{ m.content }}?{% endif %}"
        "{% endfor %}"
    )
    messages = [{"role": "user", "content": "<a> & b"}, {"role": "assistant", "content": "c</x>"}]
    assert marked(*ChatTemplate(text, "", "").render_conversation(messages)) == "<a> & b?[c</x>;]"


def test_answers_are_found_where_the_beginning_of_a_conversation_is_rendered_otherwise():
    template = ChatTemplate(STRIPPING, BEGIN, END)
    assert marked(*template.render_conversation(EXCHANGES[:2])) == "U:How are you?;A:[I am fine, thank you.</s>]"
    with pytest.raises(ChatTemplateError, match=r"differently from the whole conversation.*write \{% generation %\}"):
        template.render_conversation(EXCHANGES)
    with_blocks = STRIPPING.replace("A:{{", "A:{% generation %}{{").replace(
        "{{ eos_token }}{% endif %}{% endfor", "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor"
    )
    conversation = ChatTemplate(with_blocks, BEGIN, END).render_conversation(EXCHANGES)
    assert marked(*conversation) == "U:How are you?;A:[I</s>]U:What is it?;A:[the sea</s>]"


def test_training_data_do_not_depend_on_the_day():
    text = "{{ strftime_now('%Y') if strftime_now is defined else 'no date' }}:{{ messages[-1].content }}"
    template = ChatTemplate(text, "", "")
    assert template.render(EXCHANGES[:1]) != "no date:How are you?"
    assert template.render_conversation(EXCHANGES[:1]).text == "no date:How are you?"


def test_template_survives_pickling():
    template = pickle.loads(pickle.dumps(ChatTemplate(CHAT_ML, BEGIN, END)))
    assert template.render_conversation(EXCHANGES) == ChatTemplate(CHAT_ML, BEGIN, END).render_conversation(EXCHANGES)


def chat_spec(folder, template: str | None = None, **data):
    """Return a spec with conversations, and write its chat template if one is given."""
    if template is not None:
        (folder / "template.jinja").write_text(template)
        data["chat_template"] = "template.jinja"
    data = {"sources": {"chat": {"path": "raw", "format": "chat"}}, "packing": "best_fit", **data}
    return tiny_spec(folder, model={"document_masks": True}, data=data)


def test_built_in_template_is_the_default(tmp_path):
    spec = chat_spec(tmp_path)
    assert read_template(spec.data) == BUILT_IN_TEMPLATE
    assert check_template(spec.data, BEGIN, END).render(EXCHANGES[:1]) == "User:\nHow are you?\nAssistant:\n"


@pytest.mark.parametrize("case", CASES)
def test_common_templates_can_be_used(tmp_path, case):
    assert check_template(chat_spec(tmp_path, CASES[case].text).data).render_conversation(EXCHANGES).spans


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for %}", "Expected"),
        ("{{ raise_exception('not for us') }}", "not for us"),
        (STRIPPING, "cannot be told apart; write {% generation %} and {% endgeneration %} around them"),
        ("{% generation %}{% endgeneration %}{{ messages[0].content }}", "blocks render no text of the assistant"),
        (
            "{% for m in messages %}{% set x %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}"
            "{{ x | length }}{% endfor %}",
            "depends on the text inside",
        ),
        (
            "{% for m in messages %}{% set x %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}"
            "{{ x | upper }}{% endfor %}",
            "depends on the text inside",
        ),
        (
            "{% for m in messages %}{% generation %}{% generation %}{{ m.content }}{% endgeneration %}"
            "{% endgeneration %}{% endfor %}",
            "or a block is in another",
        ),
        ("{{ raise_exception('first\nsecond') }}", "first second"),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
            "{% if add_generation_prompt %}now you:{% endif %}",
            "is not the beginning of the conversation with the answer",
        ),
    ],
)
def test_template_that_cannot_train_is_refused_in_one_line(tmp_path, text, message):
    spec = chat_spec(tmp_path, text)
    with pytest.raises(DataError) as error:
        check_template(spec.data)
    assert message in str(error.value)
    assert str(error.value).startswith(f"chat template {tmp_path}/template.jinja: ")
    assert "\n" not in str(error.value)


def test_template_that_takes_too_much_is_refused_before_use(tmp_path):
    with pytest.raises(DataError, match=r"chat template .*: it takes more than 1024 MB; correct data.chat_template"):
        check_template(chat_spec(tmp_path, "{{ 'a' * 3000000000 }}").data)


def test_missing_template_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"chat template .*template\.jinja: No such file.*; correct data.chat_template"):
        check_template(chat_spec(tmp_path, chat_template="template.jinja").data)
    (tmp_path / "template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match="it is not UTF-8"):
        read_template(chat_spec(tmp_path, chat_template="template.jinja").data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # The tokenizers have no token <|im_end|>, so they encode it as plain text.
        (CHAT_ML, "ends the assistant's turns with no special token of the tokenizer"),
        (
            "{% for m in messages %}{% generation %}{{ bos_token }}{{ m.content }}.{% endgeneration %}{% endfor %}",
            "ends the assistant's turns with no special token of the tokenizer",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            "become one token",
        ),
    ],
)
@pytest.mark.parametrize("make_tokenizer", [byte_level_tokenizer, sentence_tokenizer])
def test_template_that_does_not_suit_the_tokenizer_is_refused(tmp_path, text, message, make_tokenizer):
    template = check_template(chat_spec(tmp_path, text).data, BEGIN, END)
    with pytest.raises(ChatTemplateError, match=message):
        ConversationEncoder(make_tokenizer()).turn_ends(template)
