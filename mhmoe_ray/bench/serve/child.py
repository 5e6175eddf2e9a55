"""A process for each contestant, which waits while others are measured, so that only one is under load at a time."""

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

from mhmoe_ray.bench.serve.engines import ENGINES, Place, Prompt
from mhmoe_ray.bench.serve.servers import SERVERS
from mhmoe_ray.bench.timing import failure
from mhmoe_ray.errors import JobError

MOST_SECONDS = 1800.0
"""Timeout in seconds for an answer, and for the start of a contestant."""
END_SECONDS = 60.0
"""Timeout in seconds for a contestant that did not answer to end the processes that it started."""


class Child:
    """Process of an engine or a server, which starts and ends with the `with` block."""

    def __init__(self, name: str, place: Place) -> None:
        self._name, self._place = name, place

    def __enter__(self) -> Self:
        place = {key: str(value) if isinstance(value, Path) else value for key, value in self._place._asdict().items()}
        settings = {"OMP_NUM_THREADS": str(self._place.threads), "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", __name__, json.dumps({"name": self._name, "place": place})]
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
            self.told = self._answer()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def ask(self, asked: Sequence[Prompt], clients: int) -> float:
        """Let an engine answer these prompts, `clients` at a time, and return the seconds it takes."""
        assert self._process.stdin is not None
        print(json.dumps([asked, clients]), file=self._process.stdin, flush=True)
        return float(self._answer()["seconds"])

    def _end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], MOST_SECONDS)[0]:
            self._interrupt()
            why = f"it has not answered in {MOST_SECONDS:,.0f} s"
            raise JobError(f"bench serve, {self._name}", why, "ask for less of it, or leave it out")
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise failure(f"bench serve, {self._name}", self._errors.read(), code)
        found: dict[str, Any] = json.loads(line)
        return found


def main() -> None:
    asked = json.loads(sys.argv[1])
    paths = {key: Path(asked["place"][key]) for key in ("checkpoint", "folder")}
    name, place = asked["name"], Place(**(asked["place"] | paths))
    # What others print goes where errors go.
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if name in SERVERS:
        with SERVERS[name](place) as url:
            _tell(own, {"url": url})
            sys.stdin.read()
        return
    answer = ENGINES[name](place)
    try:
        _tell(own, {})
        for line in sys.stdin:
            requests, clients = json.loads(line)
            began = time.perf_counter()
            answer(requests, clients)
            _tell(own, {"seconds": time.perf_counter() - began})
    except BrokenPipeError:  # whoever asked is gone
        pass
    os._exit(0)  # threads of engines are left as they are, which a plain end would wait for


def _tell(own: IO[str], what: dict[str, Any]) -> None:
    print(json.dumps(what), file=own, flush=True)


if __name__ == "__main__":
    main()
