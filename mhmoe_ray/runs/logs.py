"""Logs of a run in its directory, so that they outlive the cluster: `logs/<attempt>/<number>.log`.

What the run's job and its workers write goes to one file of its own, which the job copies in segments of 1 MiB. Of a
long log the first segment and the newest ones are kept; of a run, the newest attempts. Secrets are replaced before
anything is written (`Redactor`).
"""

import atexit
import fcntl
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import Location, ObjectPath, remove_tree

SEGMENT_BYTES = 1 << 20
NEWEST_SEGMENTS = 7
"""Number of newest segments of an attempt that are kept beside its first one."""
NEWEST_ATTEMPTS = 4
LONGEST_LINE = 64 << 10
"""Number of bytes of a line without an end after which it is written in pieces."""
SECONDS, OBJECT_SECONDS = 2.0, 15.0
"""Seconds between two copies, locally and on an object store, where each copy writes the whole segment again."""

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password of a URI
    r"|\b(?:hf_|sk-|ghp_|gho_|ghs_|ghu_|glpat-|xox[abp]-)[\w-]{16,}"  # tokens that say what they are
    r"|\bAKIA[0-9A-Z]{16}\b"  # an AWS access key
    r"|(?<=[Bb]earer )[\w.~+/=-]{8,}"
)
SHORTEST_SECRET = 8
"""Smallest number of characters of an environment variable's value that is taken for a secret because of its name."""


class Redactor:
    """Replaces secrets by `***`: values of environment variables with the name of a secret, the content of files that
    such variables name, and tokens of known forms."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        values = [v for name, v in environment.items() if _SECRET_NAME.search(name) and len(v) >= SHORTEST_SECRET]
        # Paths and addresses are no secrets, though a variable such as RAY_AUTH_TOKEN_PATH may be named like one.
        hidden = [v for v in values if not v.startswith(("/", "http://", "https://"))]
        for path in (v for v in values if v.startswith("/")):
            with suppress(OSError, UnicodeDecodeError):
                text = Path(path).read_text().strip()
                hidden += [text] if SHORTEST_SECRET <= len(text) < LONGEST_LINE else []
        longest_first = sorted(set(hidden), key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, longest_first))) if hidden else None

    def __call__(self, text: str) -> str:
        if self._values:
            text = self._values.sub("***", text)
        return _SECRET_TEXT.sub("***", text)


class LogKeeper:
    """Copies a growing file into the run directory, with secrets replaced."""

    def __init__(self, run: RunDir, attempt: int, source: Path, redact: Redactor) -> None:
        """Create the folder of the attempt's log, and remove logs of old attempts.

        Args:
            run: the run whose log it is.
            attempt: number of the attempt (a submit or a resume).
            source: file to copy.
            redact: function that replaces secrets in a text.
        """
        self._folder, self._source, self._redact = run.logs / f"{attempt:04d}", source, redact
        self._read, self._rest, self._number, self._segment = 0, b"", 1, b""
        _drop_old_attempts(run)
        self._folder.mkdir(parents=True, exist_ok=True)

    def copy(self, *, whole: bool = False) -> None:
        """Copy the lines that were added since the last call.

        Args:
            whole: whether to copy an unfinished last line too.
        """
        with self._source.open("rb") as file:
            file.seek(self._read)
            while chunk := file.read(SEGMENT_BYTES // 2):
                self._read += len(chunk)
                self._rest += chunk
                cut = self._rest.rfind(b"\n") + 1 or (len(self._rest) if len(self._rest) > LONGEST_LINE else 0)
                self._write(self._rest[:cut])
                self._rest = self._rest[cut:]
        if whole:
            self._write(self._rest)
            self._rest = b""

    def _write(self, lines: bytes) -> None:
        if not lines:
            return
        data = self._redact(lines.decode(errors="replace")).encode()
        if self._segment and len(self._segment) + len(data) > SEGMENT_BYTES:
            self._number, self._segment = self._number + 1, b""
            if (old := self._number - NEWEST_SEGMENTS) > 1:
                self._file(old).unlink(missing_ok=True)
        self._segment += data
        path = self._file(self._number)
        if isinstance(path, ObjectPath):
            path.write_bytes(self._segment)
        else:
            with path.open("ab") as file:
                file.write(data)

    def _file(self, number: int) -> Location:
        return self._folder / f"{number:06d}.log"


def _sorted(folder: Location) -> list[Location]:
    return sorted(folder.iterdir(), key=lambda path: path.name)


def _drop_old_attempts(run: RunDir) -> None:
    if run.logs.exists():
        for folder in _sorted(run.logs)[: -NEWEST_ATTEMPTS + 1]:  # with the one that begins
            remove_tree(folder)


def keep_log(run: RunDir, attempt: int) -> None:
    """Copy what this process writes to its standard output, from now to its end, if standard output is a file."""
    source = _file_of(sys.stdout.fileno())
    if source is None:
        return
    over = Event()
    seconds = OBJECT_SECONDS if isinstance(run.path, ObjectPath) else SECONDS
    try:
        keeper = LogKeeper(run, attempt, source, Redactor(os.environ))
    except OSError as e:
        _warn(run, e)
        return

    def copy_on() -> None:
        warned, last = False, False
        while not last:
            last = over.wait(seconds)
            try:
                keeper.copy(whole=last)
            except OSError as e:  # the storage may come back; the cluster has the log meanwhile
                if not warned:
                    _warn(run, e)
                warned = True

    thread = Thread(target=copy_on, name="log", daemon=True)
    thread.start()

    def finish() -> None:
        sys.stdout.flush()
        over.set()
        thread.join()

    # Python calls this after it has written the traceback of an error that ends the process.
    atexit.register(finish)


def _warn(run: RunDir, error: OSError) -> None:
    print(f"warning: the log of this attempt cannot be kept in {run.path}: {error}", flush=True)


def _file_of(descriptor: int) -> Path | None:
    """Return the path of an open regular file; None for a terminal or a pipe."""
    try:
        if sys.platform == "darwin":
            name = fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0").decode()
        else:
            name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
    except OSError:
        return None
    return Path(name) if Path(name).is_file() else None


def kept_lines(run: RunDir, attempt: int) -> Iterator[str] | None:
    """Return the lines of an attempt's log in the run directory; None if there are none."""
    folder = run.logs / f"{attempt:04d}"
    segments = _sorted(folder) if folder.exists() else []
    return _lines(segments) if segments else None


def _lines(segments: list[Location]) -> Iterator[str]:
    expected = 1
    for segment in segments:
        number = int(segment.name.removesuffix(".log"))
        if number > expected:
            yield f"[{(number - expected) * SEGMENT_BYTES >> 20} MiB of this log were not kept]"
        expected = number + 1
        yield from segment.read_bytes().decode(errors="replace").splitlines()
