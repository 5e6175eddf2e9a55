"""Process that renders by chat templates of others, with limits of time, memory and text.

Jinja's sandbox protects files, but one expression can still take all memory or never end, in code that its own process
cannot interrupt.
"""

import atexit
import os
import pickle
import signal
import sys
from functools import lru_cache
from subprocess import PIPE, Popen
from threading import Lock
from typing import IO, Any

MAX_SECONDS, MAX_BYTES = 2, 1 << 30
"""Processor time of a request for every 100 messages, and address space of the process."""
MAX_TEXT_BYTES, MAX_GROWTH = 1 << 20, 10
"""Largest reply: a number of bytes, and of further bytes for each byte of the messages."""


class ChatTemplateError(Exception):
    """Error of a chat template, or of messages that it does not accept."""

    def __init__(self, reason: str) -> None:
        super().__init__(" ".join(reason[:1000].split()))


_lock = Lock()


@lru_cache(maxsize=1)
def _start_process() -> tuple[Popen[bytes], IO[bytes], IO[bytes]]:
    command = [sys.executable, "-c", f"from {__package__}.template import answer_requests; answer_requests()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = Popen(command, env=environment, stdin=PIPE, stdout=PIPE, start_new_session=True)
    assert process.stdin is not None
    assert process.stdout is not None
    return process, process.stdin, process.stdout


# A forked process starts one of its own, because two that share its pipes would get each other's replies.
os.register_at_fork(after_in_child=_start_process.cache_clear)


@atexit.register
def _end_process() -> None:
    if _start_process.cache_info().currsize:
        _start_process()[0].communicate()


def run_limited(arguments: tuple[Any, ...], method: str, messages: Any, variables: dict[str, Any]) -> Any:
    """Return what a method of a `ChatTemplate` returns for messages; a ChatTemplateError if it exceeds a limit."""
    with _lock:
        process, requests, replies = _start_process()
        try:
            pickle.dump((arguments, method, messages, variables), requests)
            requests.flush()
            reply = pickle.load(replies)
        except BaseException as e:
            # After an interruption, the next reply would be that to this request.
            _start_process.cache_clear()
            process.communicate()
            if not isinstance(e, EOFError | BrokenPipeError):
                raise
            is_late, status = process.returncode == -signal.SIGPROF, process.returncode
            reply = ChatTemplateError(f"it takes more than {MAX_SECONDS} s" if is_late else f"it ends with {status}")
    if isinstance(reply, ChatTemplateError):
        raise reply
    return reply
