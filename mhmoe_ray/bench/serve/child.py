"""Process of an engine or a server, which waits while the others are measured, so that only one is under load."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from mhmoe_ray.bench.serve.engines import ENGINES, ContestModel, Prompt
from mhmoe_ray.bench.serve.servers import SERVERS
from mhmoe_ray.bench.timing import process_failure
from mhmoe_ray.errors import JobError

ANSWER_TIMEOUT = 1800.0
"""Timeout in seconds for the answers to a round of prompts, and for the start of an engine or a server."""
EXIT_TIMEOUT = 60.0
"""Seconds that an engine or a server that did not answer has to end its own processes before it is killed."""


class Child:
    """Context manager of the process of an engine or a server, which starts and ends with the `with` block.

    In the block, `ready_message` is the first message of the process; the key `url` in it has the URL of a server.
    """

    def __init__(self, name: str, served_model: ContestModel) -> None:
        self._name, self._served_model = name, served_model

    def __enter__(self) -> Self:
        model_fields = {
            key: str(value) if isinstance(value, Path) else value for key, value in self._served_model._asdict().items()
        }
        settings = {
            "OMP_NUM_THREADS": str(self._served_model.threads),
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", __name__, json.dumps({"name": self._name, "place": model_fields})]
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | settings,
        )
        try:
            self.ready_message = self._read_message()
        # Python does not call `__exit__` if `__enter__` raises, so the process must be closed here.
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def time_answers(self, prompts: Sequence[Prompt], clients: int) -> float:
        """Let the engine answer prompts, `clients` at a time, and return the seconds it takes."""
        assert self._process.stdin is not None
        print(json.dumps([prompts, clients]), file=self._process.stdin, flush=True)
        return float(self._read_message()["seconds"])

    def _close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # The child process ends when its stdin is closed, so this comes before the wait for its end.
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _interrupt(self) -> None:
        # SIGINT lets the child end the processes that it has started; SIGKILL would leave them running.
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _read_message(self) -> dict[str, Any]:
        """Return the next message of the child process; raise a JobError if it has ended or does not answer in time."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], ANSWER_TIMEOUT)[0]:
            self._interrupt()
            reason = f"it has not answered in {ANSWER_TIMEOUT:,.0f} s"
            raise JobError(f"bench serve, {self._name}", reason, "make the requests smaller, or leave it out")
        line = self._process.stdout.readline()
        # An empty string means the end of the pipe: the child has ended.
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise process_failure(f"bench serve, {self._name}", self._errors.read(), code)
        message: dict[str, Any] = json.loads(line)
        return message


def main() -> None:
    """Run the engine or server that the JSON argument names, until stdin is closed.

    The URL of a server is printed once it runs. An engine answers the prompts in each line on stdin, and its seconds
    are printed.
    """
    request = json.loads(sys.argv[1])
    paths = {key: Path(request["place"][key]) for key in ("checkpoint", "folder")}
    name, served_model = request["name"], ContestModel(**(request["place"] | paths))
    # Stdout is the pipe for messages, but libraries print to it too. Messages therefore use a copy of it, and all other
    # output to stdout goes to stderr.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if name in SERVERS:
        with SERVERS[name](served_model) as url:
            _send_message(output, {"url": url})
            sys.stdin.read()
        return
    answer = ENGINES[name](served_model)
    try:
        _send_message(output, {})
        for line in sys.stdin:
            requests, clients = json.loads(line)
            start_time = time.perf_counter()
            answer(requests, clients)
            _send_message(output, {"seconds": time.perf_counter() - start_time})
    # A broken pipe means that the parent process has ended, so this process ends too.
    except BrokenPipeError:
        pass
    # `os._exit` ends the process at once. A normal exit would wait for the threads of the engine.
    os._exit(0)


def _send_message(output: IO[str], message: dict[str, Any]) -> None:
    print(json.dumps(message), file=output, flush=True)


if __name__ == "__main__":
    main()
