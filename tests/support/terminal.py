"""Recordings of commands that run on a terminal."""

import os
import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pexpect

from tests.support.watch import LIMIT

FRAME = re.compile("[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏] ([^\r\n\x1b]*)")
"""An activity line each time it is drawn, without its spinner."""


class Recording(NamedTuple):
    """The exit code of a command, what it wrote to its terminal, and when it wrote nothing."""

    code: int
    text: str
    longest_silence: float
    """Longest time in seconds without any output."""
    text_before: str
    """Output before that time."""

    @property
    def frames(self) -> list[str]:
        """Activity lines with their clocks, in each state that was drawn."""
        return FRAME.findall(self.text)

    def assert_clean_end(self) -> None:
        """Assert that the last activity line was erased, and that the cursor is visible."""
        end = self.text[[match.end() for match in FRAME.finditer(self.text)][-1] :]
        assert re.match(r"(\r\x1b\[2K|\x1b\[1A|\r|\n)*\x1b\[\?25h", end), end
        assert "\x1b[?25l" not in end


def record(folder: Path, words: Sequence[str], interrupt_at: str | None = None) -> Recording:
    """Run a command in `folder` on a terminal until it ends, with Ctrl-C when it has written `interrupt_at`.

    Time in which the process could run and had to wait for a processor is no silence of its own, so it does not count.
    """
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    environment.pop("COLUMNS", None)
    terminal = pexpect.spawn(
        words[0],
        words[1:],
        cwd=folder,
        dimensions=(40, 100),
        env=environment,
        encoding="utf-8",
        timeout=LIMIT,
        # A process that a shell starts in the background ignores Ctrl-C, and its children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    text, text_before, longest_silence = "", "", 0.0
    start, start_wait = time.monotonic(), _processor_wait(terminal.pid)
    deadline = start + LIMIT
    with suppress(pexpect.EOF):
        while True:
            assert time.monotonic() < deadline, text
            output = ""
            with suppress(pexpect.TIMEOUT):
                output = terminal.read_nonblocking(100_000, 0.05)
            current, wait = time.monotonic(), _processor_wait(terminal.pid)
            silence = current - start - (wait - start_wait)
            if silence > longest_silence:
                longest_silence, text_before = silence, text
            if output:
                text, start, start_wait = text + output, current, wait
            if interrupt_at and interrupt_at in text:
                terminal.sendintr()
                interrupt_at = None
    terminal.close()
    return Recording(terminal.exitstatus, text, longest_silence, text_before)


def _processor_wait(pid: int) -> float:
    """Return for how many seconds the main thread of a process has waited for a processor."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
