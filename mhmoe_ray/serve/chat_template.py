"""Conversations as prompts, by a Jinja template with the same functions and filters as in Hugging Face's tokenizers."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mhmoe_ray.errors import ServeError
from mhmoe_ray.runs.directory import RunDir


class ChatTemplate:
    def __init__(self, text: str, begin: str, end: str) -> None:
        """Compile the template.

        Args:
            text: the template.
            begin: text of the token that starts a document.
            end: text of a token that ends a document.

        Raises:
            ServeError: the text is not a valid template.
        """
        self.text = text
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _as_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        # There are none of the last two, which templates may ask of.
        self._given = {"bos_token": begin, "eos_token": end, "tools": None, "documents": None}
        try:
            self._template = environment.from_string(text)
        except Exception as e:  # Jinja's own, and Python's of the code that it makes
            raise ServeError("the chat template", str(e), "correct chat_template.jinja in the run directory") from e

    @classmethod
    def of_run(cls, run: RunDir, begin: str, end: str) -> "ChatTemplate | None":
        """Return the chat template of a run; None if the run has none."""
        file = run.chat_template_file
        return cls(file.read_text(), begin, end) if file.exists() else None

    def prompt(self, messages: Sequence[dict[str, Any]]) -> str:
        """Return the text of the conversation, up to where the assistant's answer begins.

        Raises:
            ServeError: the template does not accept these messages.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._given)
        except Exception as e:  # whatever the template's own code raises
            raise ServeError("the messages", str(e), "send what the model's chat template takes") from e


class _Generation(Extension):
    """The block `{% generation %}`, which marks the assistant's text for training; here it renders the text inside."""

    tags = {"generation"}  # noqa: RUF012 - so Jinja has it

    def parse(self, parser: Parser) -> Scope:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replacement of Jinja's own `tojson`, which escapes HTML characters and sorts keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
