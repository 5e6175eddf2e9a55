"""Conversations as prompts, by a Jinja template; what it may use is as in Hugging Face's tokenizers."""

from collections.abc import Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mhmoe_ray.errors import ServeError
from mhmoe_ray.runs.layout import RunDir


class ChatTemplate:
    def __init__(self, text: str, begin: str, end: str) -> None:
        """Args:
        text: the template.
        begin: the token that starts a document, as text.
        end: one that ends it.

        Raises:
            ServeError: it is no template.
        """
        self.text = text
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        self._edges = {"bos_token": begin, "eos_token": end}
        try:
            self._template = environment.from_string(text)
        except TemplateError as e:
            raise ServeError("the chat template", str(e), "correct chat_template.jinja in the run directory") from e

    @classmethod
    def of_run(cls, run: RunDir, begin: str, end: str) -> "ChatTemplate | None":
        """None where the run has none."""
        file = run.chat_template_file
        return cls(file.read_text(), begin, end) if file.exists() else None

    def prompt(self, messages: Sequence[dict[str, Any]]) -> str:
        """The text that an answer of the assistant follows.

        Raises:
            ServeError: the template does not take these messages.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._edges)
        except TemplateError as e:
            raise ServeError("the messages", str(e), "send what the model's chat template takes") from e


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
