"""Record a terminal session of `mhmoe submit` and `mhmoe status` as session.svg: python jobs/pictures/session.py

The commands are real ones, on a local cluster, with the quickstart's spec at a tenth of its steps. They need the
quickstart's sample text, which `mhmoe data sample data/sample` writes.
"""

import io
import re
import sys
from pathlib import Path

import pexpect
from rich.console import Console
from rich.text import Text

WIDTH, PROMPT = 92, "$ "
COMMANDS = (
    "submit jobs/quickstart.yaml --set train.steps=70 --set train.validate_every=35 --set train.checkpoint_every=35",
    "status",
)
PLAN_LINES = 6
"""Number of lines kept of the plan that `submit` begins with; the image leaves out the rest."""
CONTROL = re.compile(r"\x1b\[(\d*)([A-Za-z])|\x1b\[\?\d+[hl]|\r|\n")


def screen_of(output: str) -> list[str]:
    """Return the lines that a terminal shows after it has received this output.

    Control sequences that move the cursor or delete a line are applied; colours stay in the lines.
    """
    lines, row, start = [""], 0, 0
    for match in CONTROL.finditer(output):
        lines[row] += output[start : match.start()]
        start = match.end()
        count, command = int(match[1] or 1), match[2]
        if match[0] == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif match[0] == "\r" or command == "K":
            lines[row] = ""
        elif command == "A":
            row = max(0, row - count)
        elif command == "m":
            lines[row] += match[0]
    lines[row] += output[start:]
    return [line.rstrip() for line in lines]


def session(arguments: str) -> list[str]:
    """Run `mhmoe` with these arguments in a terminal of `WIDTH` columns; return the lines on the screen at its end."""
    command = [sys.executable, "-m", "mhmoe_ray.cli.app", *arguments.split()]
    child = pexpect.spawn(command[0], command[1:], dimensions=(60, WIDTH), encoding="utf-8", timeout=900)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0, child.before
    # `screen_of` clears the line at a carriage return, because a program then writes over the line. Before a line feed,
    # a carriage return only ends the line, so it is removed there.
    return screen_of(child.before.replace("\r\n", "\n"))


def main() -> None:
    """Run the commands of the session, and save what the terminal showed as session.svg beside this file."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    for number, arguments in enumerate(COMMANDS):
        lines = [line for line in session(arguments) if line.strip()]
        if number == 0:
            first_event = next(i for i, line in enumerate(lines) if "run quickstart-" in line)
            lines = [*lines[:PLAN_LINES], "...", *lines[first_event:]]
        console.print(Text.assemble((PROMPT, "bold green"), (f"mhmoe {arguments}", "bold")))
        for line in lines:
            text = Text.from_ansi(line)
            text.plain = text.plain.replace(str(Path.cwd()), "~/mhmoe-ray")
            console.print(text, no_wrap=True, overflow="ellipsis")
        console.print()
    # The fonts, which rich loads from web addresses, are removed, so that a page shows the image in its own monospace
    # font.
    image = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="mhmoe-ray"), flags=re.S)
    Path(__file__).with_name("session.svg").write_text(image)


if __name__ == "__main__":
    main()
