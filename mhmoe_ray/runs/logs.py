"""Logs of a run, which are copied to its run directory because they must outlive the cluster.

The output of the run's job and its workers goes to one file, which the job copies in segments of 1 MiB to
`logs/<attempt>/<number of the segment>.log`. The first segment and the newest ones of the newest attempts are kept.
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

# Size in bytes at which a segment of a run's log is full. Together with `NEWEST_SEGMENTS` and `NEWEST_ATTEMPTS` it
# limits the logs of a run to 32 MiB.
SEGMENT_BYTES = 1 << 20
NEWEST_SEGMENTS = 7
"""Number of newest segments of an attempt that are kept besides its first one."""
NEWEST_ATTEMPTS = 4
MAX_LINE_BYTES = 64 << 10
"""Size above which an unfinished line of the log is copied without waiting for its end."""
COPY_SECONDS, OBJECT_COPY_SECONDS = 2.0, 15.0
"""Seconds between two copies of the log; each copy to an object store writes the whole segment again."""

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # the user and password of a URI
    r"|\b(?:hf_|sk-|ghp_|gho_|ghs_|ghu_|glpat-|xox[abp]-)[\w-]{16,}"  # tokens with the prefix of their service
    r"|\bAKIA[0-9A-Z]{16}\b"  # an AWS access key
    r"|(?<=[Bb]earer )[\w.~+/=-]{8,}"
)
MIN_SECRET_CHARACTERS = 8
"""Length from which the value of an environment variable counts as a secret."""


class Redactor:
    """Function that replaces the secrets in a text by `***`.

    Secrets are values of environment variables with a name such as TOKEN or PASSWORD, the contents of files that such
    variables name, passwords in URIs, and tokens of known forms.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        values = [v for name, v in environment.items() if _SECRET_NAME.search(name) and len(v) >= MIN_SECRET_CHARACTERS]
        # A path or an address is no secret, even if its variable has the name of a secret, such as RAY_AUTH_TOKEN_PATH.
        secret_values = [v for v in values if not v.startswith(("/", "http://", "https://"))]
        for path in (v for v in values if v.startswith("/")):
            with suppress(OSError, UnicodeDecodeError):
                text = Path(path).read_text().strip()
                secret_values += [text] if MIN_SECRET_CHARACTERS <= len(text) < MAX_LINE_BYTES else []
        # If one secret begins with another, the longer one must match first. Otherwise its end would stay in the text.
        longest_first = sorted(set(secret_values), key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, longest_first))) if secret_values else None

    def __call__(self, text: str) -> str:
        if self._values:
            text = self._values.sub("***", text)
        return _SECRET_TEXT.sub("***", text)


class LogArchiver:
    """Archiver that copies a growing log file into the run directory, with secrets replaced."""

    def __init__(self, run: RunDir, attempt: int, source: Path, redact: Redactor) -> None:
        self._folder, self._source, self._redact = run.logs / f"{attempt:04d}", source, redact
        self._offset, self._partial_line, self._segment_number, self._segment = 0, b"", 1, b""
        _remove_old_logs(run)
        self._folder.mkdir(parents=True, exist_ok=True)

    def copy(self, *, include_partial_line: bool = False) -> None:
        """Copy the lines that were added to the log since the last call."""
        with self._source.open("rb") as file:
            file.seek(self._offset)
            while chunk := file.read(SEGMENT_BYTES // 2):
                self._offset += len(chunk)
                self._partial_line += chunk
                cut = self._partial_line.rfind(b"\n") + 1 or (
                    len(self._partial_line) if len(self._partial_line) > MAX_LINE_BYTES else 0
                )
                self._write(self._partial_line[:cut])
                self._partial_line = self._partial_line[cut:]
        if include_partial_line:
            self._write(self._partial_line)
            self._partial_line = b""

    def _write(self, lines: bytes) -> None:
        if not lines:
            return
        data = self._redact(lines.decode(errors="replace")).encode()
        # The segment and its number change only after the lines are written. If the storage fails, the next call has
        # the same lines again.
        number, segment = self._segment_number, self._segment + data
        if self._segment and len(segment) > SEGMENT_BYTES:
            number, segment = number + 1, data
        path = self._file(number)
        if isinstance(path, ObjectPath):
            path.write_bytes(segment)
        else:
            with path.open("ab") as file:
                file.write(data)
        is_new, self._segment_number, self._segment = number > self._segment_number, number, segment
        if is_new and (old_number := number - NEWEST_SEGMENTS) > 1:
            self._file(old_number).unlink(missing_ok=True)

    def _file(self, number: int) -> Location:
        return self._folder / f"{number:06d}.log"


def _sorted_files(folder: Location) -> list[Location]:
    return sorted(folder.iterdir(), key=lambda path: path.name)


def _remove_old_logs(run: RunDir) -> None:
    if run.logs.exists():
        # One folder fewer than `NEWEST_ATTEMPTS` is kept, because the attempt that begins now is one of the newest and
        # has no folder yet.
        for folder in _sorted_files(run.logs)[: -NEWEST_ATTEMPTS + 1]:
            remove_tree(folder)


def archive_log(run: RunDir, attempt: int) -> None:
    """Start a thread that copies standard output, if it is a file, to the run directory, and only warns of errors."""
    source = _open_file_path(sys.stdout.fileno())
    if source is None:
        return
    process_ended = Event()
    seconds = OBJECT_COPY_SECONDS if isinstance(run.path, ObjectPath) else COPY_SECONDS
    try:
        archiver = LogArchiver(run, attempt, source, Redactor(os.environ))
    except OSError as e:
        _warn(run, e)
        return

    def copy_repeatedly() -> None:
        has_warned, is_last_copy = False, False
        while not is_last_copy:
            is_last_copy = process_ended.wait(seconds)
            try:
                archiver.copy(include_partial_line=is_last_copy)
            except OSError as e:
                # The error is only reported, because the storage may recover, and the cluster keeps the log meanwhile.
                if not has_warned:
                    _warn(run, e)
                has_warned = True

    thread = Thread(target=copy_repeatedly, name="log", daemon=True)
    thread.start()

    def finish() -> None:
        sys.stdout.flush()
        process_ended.set()
        thread.join()

    # Python calls `finish` after it has printed the traceback of an error that ends the process, so the copy includes
    # the traceback.
    atexit.register(finish)


def _warn(run: RunDir, error: OSError) -> None:
    print(f"warning: the log of this attempt cannot be kept in {run.path}: {error}", flush=True)


def _open_file_path(descriptor: int) -> Path | None:
    """Return the path of the regular file behind a file descriptor; None for a terminal or a pipe."""
    try:
        if sys.platform == "darwin":
            name = fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0").decode()
        else:
            name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
    except OSError:
        return None
    return Path(name) if Path(name).is_file() else None


def archived_lines(run: RunDir, attempt: int) -> Iterator[str] | None:
    """Return the lines of an attempt's log, with one in brackets for segments not kept; None without a log."""
    folder = run.logs / f"{attempt:04d}"
    segments = _sorted_files(folder) if folder.exists() else []
    return _read_lines(segments) if segments else None


def _read_lines(segments: list[Location]) -> Iterator[str]:
    expected_number = 1
    for segment in segments:
        number = int(segment.name.removesuffix(".log"))
        if number > expected_number:
            yield f"[{(number - expected_number) * SEGMENT_BYTES >> 20} MiB of this log were not kept]"
        expected_number = number + 1
        yield from segment.read_bytes().decode(errors="replace").splitlines()
