"""Chat templates like those of published models, each with a function that renders it without Jinja.

A rendering is a list of pieces. A piece is a text, and whether it is an answer of the assistant. The text before an
answer is the prompt that a server sends to the model.
"""

from collections.abc import Callable
from typing import NamedTuple

from mhmoe_ray.data.chat.template import BUILT_IN_TEMPLATE, Message

Piece = tuple[str, bool]
BEGIN, END = "<s>", "</s>"
"""Tokens that begin and end a document in the tokenizers of these tests."""


class TemplateCase(NamedTuple):
    """A chat template, and its rendering by hand."""

    text: str
    render_by_hand: Callable[[list[Message]], list[Piece]]
    special_tokens: tuple[str, ...] = ()
    """Special tokens that the template writes, besides those that begin and end a document."""
    takes_system: bool = True


def built_in(messages: list[Message]) -> list[Piece]:
    pieces: list[Piece] = []
    for message in messages:
        content = message["content"].strip()
        if message["role"] == "assistant":
            pieces += [("Assistant:\n", False), (content + END, True)]
        else:
            pieces += [({"system": "System", "user": "User"}[message["role"]] + ":\n" + content + "\n", False)]
    return pieces


def chat_ml(messages: list[Message]) -> list[Piece]:
    pieces: list[Piece] = []
    for message in messages:
        header, body = f"<|im_start|>{message['role']}\n", f"{message['content']}<|im_end|>\n"
        pieces += [(header, False), (body, message["role"] == "assistant")]
    return pieces


CHAT_ML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

CHAT_ML_WITH_BLOCKS = """\
{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}\
{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}\
{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def chat_ml_with_blocks(messages: list[Message]) -> list[Piece]:
    """Render ChatML; the line break after a turn is outside of the generation block, so it is no target."""
    pieces: list[Piece] = []
    for message in messages:
        is_answer = message["role"] == "assistant"
        pieces += [(f"<|im_start|>{message['role']}\n", False), (message["content"] + "<|im_end|>", is_answer)]
        pieces += [("\n", False)]
    return pieces


LLAMA_3 = """\
{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' \
+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""


def llama_3(messages: list[Message]) -> list[Piece]:
    pieces: list[Piece] = [(BEGIN, False)]
    for message in messages:
        header = f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n"
        pieces += [(header, False), (message["content"].strip() + "<|eot_id|>", message["role"] == "assistant")]
    return pieces


MISTRAL = """\
{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"""


def mistral(messages: list[Message]) -> list[Piece]:
    pieces: list[Piece] = [(BEGIN, False)]
    for message in messages:
        if message["role"] == "user":
            pieces += [(f"[INST] {message['content']} [/INST]", False)]
        else:
            pieces += [(f" {message['content']}{END}", True)]
    return pieces


CASES: dict[str, TemplateCase] = {
    "built-in": TemplateCase(BUILT_IN_TEMPLATE, built_in),
    "ChatML": TemplateCase(CHAT_ML, chat_ml, ("<|im_start|>", "<|im_end|>")),
    "ChatML with blocks": TemplateCase(CHAT_ML_WITH_BLOCKS, chat_ml_with_blocks, ("<|im_start|>", "<|im_end|>")),
    "Llama 3": TemplateCase(LLAMA_3, llama_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "Mistral": TemplateCase(MISTRAL, mistral, takes_system=False),
}
