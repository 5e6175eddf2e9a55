"""Chat templates: Jinja templates that render a conversation as a prompt.

They have the same functions, filters and blocks as in Hugging Face's tokenizers.
"""

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
    """The compiled chat template of a model."""

    def __init__(self, text: str, start_text: str, end_text: str) -> None:
        """Compile the template.

        Args:
            text: the template.
            start_text: text of the token that starts a document.
            end_text: text of a token that ends a document.

        Raises:
            ServeError: the text is not a valid template.
        """
        self.text = text
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_template_error, "strftime_now": _format_now}
        # Templates may ask whether there are tools or documents; this server has neither.
        self._variables = {"bos_token": start_text, "eos_token": end_text, "tools": None, "documents": None}
        try:
            self._template = environment.from_string(text)
        # Jinja compiles a template to Python code, so both Jinja's errors and Python's are errors of the template.
        except Exception as e:
            raise ServeError("the chat template", str(e), "correct chat_template.jinja in the run directory") from e

    @classmethod
    def from_run(cls, run: RunDir, start_text: str, end_text: str) -> "ChatTemplate | None":
        """Return the chat template of a run; None if the run has none."""
        file = run.chat_template_file
        return cls(file.read_text(), start_text, end_text) if file.exists() else None

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """Return the conversation as a prompt, up to where the assistant's answer begins.

        Raises:
            ServeError: the template does not accept these messages.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._variables)
        # The template's code may raise any exception, such as a TypeError.
        except Exception as e:
            raise ServeError("the messages", str(e), "send what the model's chat template takes") from e


class _GenerationBlock(Extension):
    """The block `{% generation %}`, which marks the assistant's text for training; here it renders the text inside."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> Scope:
        """Return the statements inside the block, in a scope of their own. Jinja calls this at the block's tag."""
        # As in transformers, the block has its own scope, so variables that are set inside are not visible outside.
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_template_error(message: str) -> NoReturn:
    """Raise a `TemplateError` with this message; templates call it as `raise_exception`."""
    raise TemplateError(message)


def _format_now(time_format: str) -> str:
    """Return the present local time in a format of `strftime`; templates call it as `strftime_now`."""
    return datetime.now().strftime(time_format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return a value as JSON; templates use it as the filter `tojson`."""
    # Jinja's own `tojson` escapes HTML characters and sorts keys, which would change prompts.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
