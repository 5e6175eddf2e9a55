"""Tests that texts of others cannot control the terminal on which they are printed."""

import io

import pytest
from rich.table import Table
from rich.text import Text

from mhmoe_ray.cli.output import SafeConsole
from mhmoe_ray.errors import PART_LENGTH, DataError
from mhmoe_ray.terminal import printable, printable_colours, without_colours

TITLE = "\x1b]0;title\x07"


@pytest.mark.parametrize(
    "text",
    [TITLE, "\x1b]52;c;Y29weQ==\x07", "\x9b2J", "a\rb", "\x08", "\x7f", "\u202egnp.exe", "\u2066", "\ud800", "\x00"],
    ids=ascii,
)
def test_what_a_terminal_obeys_is_an_escape(text):
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)
    output = io.StringIO()
    console = SafeConsole(file=output, width=200, force_terminal=True, color_system="truecolor")
    table = Table(title=text)
    table.add_row(text)
    for item in (text, Text(text), table, [text]):
        console.print(item)
    assert text not in output.getvalue()
    for part in (DataError(text, "a", "b"), DataError("a", text, "b"), DataError("a", "b", text)):
        assert str(part).isprintable()


def test_texts_and_colours_stay():
    assert printable("ein Jäger\t日本 🦊\n") == "ein Jäger\t日本 🦊\n"
    assert printable_colours(f"\x1b[31mred\x1b[0m {TITLE}") == "\x1b[31mred\x1b[0m \\x1b]0;title\\x07"
    assert without_colours("\x1b[31mred\x1b[0m") == "red"
    output = io.StringIO()
    SafeConsole(file=output, force_terminal=True, color_system="standard").print("a", style="red")
    assert output.getvalue() == "\x1b[31ma\x1b[0m\n"


def test_long_values_are_cut_in_messages():
    message = str(DataError("x" * 100_000, "y " * 100_000, "/" + "z" * 300))
    assert len(message) < 2 * PART_LENGTH
    assert "z" * 300 in message
