"""Chat templates: Jinja templates that render a conversation as a text.

They have the functions, filters and blocks of Hugging Face's tokenizers.
"""

import json
import pickle
import re
import resource
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property, lru_cache, wraps
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Name, Output, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mhmoe_ray.data.chat.process import (
    MAX_BYTES,
    MAX_GROWTH,
    MAX_SECONDS,
    MAX_TEXT_BYTES,
    ChatTemplateError,
    run_limited,
)
from mhmoe_ray.errors import DataError

# The process of a template starts quickly because it does not import this.
if TYPE_CHECKING:
    from mhmoe_ray.spec import DataSpec

Message = dict[str, Any]
"""Message of a conversation: its `role`, its `content` and perhaps a `name`."""

# The prompt ends with a line break and the contents of messages are trimmed, so that no tokenizer of words joins the
# end of the prompt with the first word of an answer.
BUILT_IN_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message.role == "assistant" -%}
        {{- "Assistant:\\n" -}}
        {%- generation -%}{{- message.content | trim + eos_token -}}{%- endgeneration -%}
    {%- elif message.role in ["system", "user"] -%}
        {{- message.role | capitalize + ":\\n" + message.content | trim + "\\n" -}}
    {%- else -%}
        {{- raise_exception("a role is system, user or assistant, not " + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "Assistant:\\n" -}}{%- endif -%}
"""
"""Template for a spec that names none: plain role headers, and the end token after each answer."""

# Names of variables that a template prints before and after the text of a `{% generation %}` block. They are empty
# strings except while the positions of these blocks are looked for.
_BLOCK_START, _BLOCK_STOP = "_generation_start", "_generation_stop"
_NO_MARKS = {_BLOCK_START: "", _BLOCK_STOP: ""}


SPELLING_MARK = "\ufdd0\ufdef"
"""Mark in a special token that a message spells, after its first character. Unicode reserves its characters for such
uses."""


class Span(NamedTuple):
    """Span of a text: the characters from `start` to `stop` - 1."""

    start: int
    stop: int


class RenderedConversation(NamedTuple):
    """Conversation rendered as the text that a model reads."""

    text: str
    spans: tuple[Span, ...]
    """Spans of the assistant's turns in order, each with the text that ends the turn."""


T = TypeVar("T")


def _with_limits(method: "Callable[..., T]") -> "Callable[..., T]":
    """Let a method mark the special tokens in messages and, for a template of others, run in its process."""

    @wraps(method)
    def run_with_limits(template: "ChatTemplate", messages: Sequence[Message], **variables: Any) -> T:
        messages, variables = template._marked(messages), template._marked(variables)
        if template._is_trusted:
            return method(template, messages, **variables)
        result: T = run_limited(template._texts, method.__name__, messages, variables)
        return result

    return run_with_limits


class ChatTemplate:
    """Compiled chat template; text that does not compile raises ChatTemplateError.

    Where a message spells one of `special_texts`, the rendered text has a `SPELLING_MARK`. Encoders split the text
    there, so that no message forges a turn, and other conversations keep their tokens.
    """

    def __init__(
        self, text: str, start_text: str, end_text: str, special_texts: Sequence[str] = (), is_trusted: bool = False
    ) -> None:
        self.text, self._texts, self._special_texts = text, (text, start_text, end_text), special_texts
        # A token of one character cannot be split.
        spellings = [re.escape(spelling) for spelling in {start_text, end_text, *special_texts} if len(spelling) > 1]
        self._spelling = re.compile("|".join(spellings) or r"(?!)")
        self._is_trusted = is_trusted or text == BUILT_IN_TEMPLATE
        if not self._is_trusted:
            self.accepts([])
            return
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        self._environment.filters["tojson"] = _to_json
        self._environment.globals["raise_exception"] = _raise_template_error
        # Templates may ask whether there are tools or documents; training has neither, and a server has no documents.
        self._variables = {"bos_token": start_text, "eos_token": end_text, "tools": None, "documents": None}
        try:
            self._template = self._environment.from_string(text, {"strftime_now": _format_now})
            syntax_tree = self._environment.parse(text)
        except MemoryError:
            raise
        # Jinja compiles a template to Python code, so both Jinja's errors and Python's are errors of the template.
        except Exception as e:
            raise ChatTemplateError(str(e)) from e
        self._has_generation_blocks = any(name.name == _BLOCK_START for name in syntax_tree.find_all(Name))

    def __reduce__(self) -> tuple[Any, ...]:
        # Jinja's objects cannot be pickled, so another process compiles the template again.
        return ChatTemplate, (*self._texts, self._special_texts)

    @cached_property
    def _timeless_template(self) -> Template:
        """The template without `strftime_now`, so that training data do not depend on the day."""
        return self._environment.from_string(self.text)

    @_with_limits
    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """Return the prompt for the assistant's next answer; rejected messages raise ChatTemplateError.

        `variables`, such as `tools`, are further variables of the template.
        """
        return self._render(self._template, messages, add_generation_prompt=True, **variables)

    @_with_limits
    def render_conversation(self, messages: Sequence[Message]) -> RenderedConversation:
        """Return the whole conversation as training reads it, with the spans of the assistant's turns.

        The spans are the template's `{% generation %}` blocks. Without such blocks, a turn is what follows its prompt;
        a template that renders the beginning of a conversation differently is then a ChatTemplateError.
        """
        text = self._render(self._timeless_template, messages)
        spans = self._block_spans(messages, text) if self._has_generation_blocks else self._turn_spans(messages, text)
        return RenderedConversation(text, tuple(span for span in spans if span.stop > span.start))

    @_with_limits
    def accepts(self, messages: Sequence[Message]) -> bool:
        """Return whether the template renders these messages without an error."""
        try:
            self._render(self._timeless_template, messages)
        except ChatTemplateError:
            return False
        return True

    @_with_limits
    def check_prompts(self, messages: Sequence[Message]) -> None:
        """Raise ChatTemplateError if a server's prompts would not be the beginnings of training's conversations."""
        for prompt, text_with_turn in self._turns(messages):
            if not text_with_turn.startswith(prompt):
                raise ChatTemplateError(
                    "its prompt (add_generation_prompt) is not the beginning of the conversation with the answer, "
                    "so a server would ask otherwise than in training"
                )

    def _marked(self, value: Any) -> Any:
        """Return messages, or a part of them, with a mark in each spelling of a special token."""
        if isinstance(value, str):
            # The mark may leave another special token in the spelling.
            while self._spelling.search(value):
                value = self._spelling.sub(lambda spelling: spelling[0][0] + SPELLING_MARK + spelling[0][1:], value)
        elif isinstance(value, dict):
            return {key: self._marked(item) for key, item in value.items()}
        elif isinstance(value, list):
            return [self._marked(item) for item in value]
        return value

    def _turns(self, messages: Sequence[Message]) -> Iterator[tuple[str, str]]:
        """Yield the prompt for each of the assistant's turns, and the text up to the end of the turn."""
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._render(self._timeless_template, messages[:number], add_generation_prompt=True)
                yield prompt, self._render(self._timeless_template, messages[: number + 1])

    def _render(
        self,
        template: Template,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        marks: dict[str, str] = _NO_MARKS,
        **variables: Any,
    ) -> str:
        try:
            variables = {**self._variables, **variables, **marks}
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        except MemoryError:
            raise
        # The template's code may raise any exception, such as a TypeError.
        except Exception as e:
            raise ChatTemplateError(str(e)) from e

    def _turn_spans(self, messages: Sequence[Message], text: str) -> Iterator[Span]:
        for prompt, text_with_turn in self._turns(messages):
            if not (text.startswith(text_with_turn) and text_with_turn.startswith(prompt)):
                raise ChatTemplateError(
                    "it renders the beginning of a conversation differently from the whole conversation, so the "
                    "assistant's turns cannot be told apart; write {% generation %} and {% endgeneration %} around them"
                )
            yield Span(len(prompt), len(text_with_turn))

    def _block_spans(self, messages: Sequence[Message], text: str) -> Iterator[Span]:
        # The mark is random, so that no message can contain it.
        mark = secrets.token_hex(16)
        marks = {_BLOCK_START: f"<{mark}>", _BLOCK_STOP: f"</{mark}>"}
        marked_text = self._render(self._timeless_template, messages, marks=marks)
        # The split gives texts and marks in turn, and the marks must be starts and stops of blocks in turn. The checks
        # below fail if the template keeps the output of a block in a variable and changes it before printing.
        pieces = re.split(f"(</?{mark}>)", marked_text)
        printed_marks, edges = pieces[1::2], list(accumulate(map(len, pieces[::2])))
        if "".join(pieces[::2]) != text or printed_marks != [*marks.values()] * (len(printed_marks) // 2):
            raise ChatTemplateError(
                "the text around its {% generation %} blocks depends on the text inside, or a block is in another; "
                "write the blocks where the text is printed"
            )
        yield from map(Span._make, zip(edges[::2], edges[1::2], strict=False))


def read_template(spec: "DataSpec") -> str:
    """Return the text of a spec's chat template; an unreadable file is a DataError."""
    if spec.chat_template is None:
        return BUILT_IN_TEMPLATE
    try:
        return spec.chat_template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = (isinstance(e, OSError) and e.strerror) or "it is not UTF-8"
        raise DataError(_subject(spec), reason, "correct data.chat_template") from e


# The answers begin with words that most tokenizers join with a space before them. Trying the template on them shows
# whether its prompt ends with a space.
EXCHANGES: list[Message] = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "I am fine, thank you."},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "the sea"},
]
"""Conversation on which templates are tried before any data is read."""


def check_template(
    spec: "DataSpec", start_text: str = "", end_text: str = "", special_texts: Sequence[str] = ()
) -> ChatTemplate:
    """Compile a spec's chat template, try it on a conversation, and return it.

    The texts are those of `ChatTemplate`. A template that cannot be read, compiled or used is a DataError.
    """
    text = read_template(spec)
    try:
        template = ChatTemplate(text, start_text, end_text, special_texts)
        # A template may accept only a single exchange: one question and its answer.
        messages = EXCHANGES if template.accepts(EXCHANGES) else EXCHANGES[:2]
        if not template.render_conversation(messages).spans:
            raise ChatTemplateError("its {% generation %} blocks render no text of the assistant")
        template.check_prompts(messages)
    except ChatTemplateError as e:
        raise template_error(spec, str(e)) from e
    return template


def template_error(spec: "DataSpec", reason: str) -> DataError:
    """Return the DataError for a spec whose chat template cannot be used."""
    return DataError(_subject(spec), reason, "correct data.chat_template, or leave it out for the built-in template")


def _subject(spec: "DataSpec") -> str:
    return f"chat template {spec.chat_template}" if spec.chat_template else "the built-in chat template"


class _GenerationBlock(Extension):
    """The block `{% generation %}`, which marks the assistant's text and renders it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> Scope:
        # As in transformers, the block has its own scope, so variables that are set inside are not visible outside.
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, stop = (Output([Name(name, "load")], lineno=line) for name in (_BLOCK_START, _BLOCK_STOP))
        return Scope([start, *body, stop], lineno=line)


def _raise_template_error(message: str) -> NoReturn:
    raise TemplateError(message)


def _format_now(time_format: str) -> str:
    return datetime.now().strftime(time_format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own `tojson` escapes HTML characters and sorts keys, which would change prompts.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def answer_requests() -> None:
    """Answer the requests of `run_limited` in standard input until it ends, in the process that it starts."""
    # macOS has no limit of the address space.
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    template = lru_cache(maxsize=8)(ChatTemplate)
    with suppress(EOFError, BrokenPipeError):
        while True:
            arguments, method, messages, variables = pickle.load(sys.stdin.buffer)
            # The default action of SIGPROF ends the process, even amid a computation in C.
            signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS * (1 + len(messages) // 100))
            try:
                render = getattr(template(*arguments, is_trusted=True), method)
                reply = pickle.dumps(render(messages, **variables))
                if len(reply) > MAX_TEXT_BYTES + MAX_GROWTH * len(pickle.dumps((messages, variables))):
                    raise ChatTemplateError(f"it renders {len(messages)} messages as {len(reply):,} bytes")
            except ChatTemplateError as e:
                reply = pickle.dumps(e)
            except MemoryError:
                reply = pickle.dumps(ChatTemplateError(f"it takes more than {MAX_BYTES >> 20} MB"))
            sys.stdout.buffer.write(reply)
            sys.stdout.buffer.flush()
