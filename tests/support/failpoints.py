"""Operations on files as failpoints: each can be recorded, fail with an OSError, or kill its process.

The functions of Python that change files are replaced by ones that first call a callback. Only operations on paths
below given folders count. Code that is not Python, such as safetensors' writer, changes files unseen.
"""

import builtins
import io
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock


class Operation(NamedTuple):
    """Operation on a file or folder, before it is done; a write is half done."""

    kind: str
    """Name of the function, such as "fsync", or "write" for a write to an open file."""
    path: Path


class Failpoint(NamedTuple):
    """Operation that fails: the n-th one of a thread, counted from 1, as threads do their operations in any order."""

    thread: str
    number: int
    error: int | None
    """Error number of the OSError that the operation raises; None if it kills its process."""


def _full_path(path: Any, folder_descriptor: int | None) -> Path:
    """Return the absolute path of a name in an open folder, or of an open file."""
    descriptor = path if isinstance(path, int) else folder_descriptor
    folder = Path.cwd() if descriptor is None else Path(f"/proc/self/fd/{descriptor}").readlink()
    return folder if isinstance(path, int) else folder / os.fsdecode(path)


WRITES_PER_REPORT = 16


class _WatchedFile:
    """Open file that reports its first write, and then one of `WRITES_PER_REPORT`, when half of it is done."""

    def __init__(self, file: Any, report: Callable[[], None]) -> None:
        self._file, self._report, self._write_count = file, report, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_WatchedFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        half = len(data) // 2
        self._file.write(data[:half])
        if self._write_count % WRITES_PER_REPORT == 0:
            self._report()
        self._write_count += 1
        self._file.write(data[half:])
        return len(data)


@contextmanager
def watched_operations(folders: Sequence[Path], on_operation: Callable[[Operation], None]) -> Iterator[None]:
    """Call `on_operation` at each operation of this process, in any thread, on a path below `folders`.

    An error that the callback raises is that of the operation, which is then not done.
    """

    def report(kind: str, path: Any, folder_descriptor: int | None = None) -> bool:
        full_path = _full_path(path, folder_descriptor)
        is_watched = any(full_path.is_relative_to(folder) for folder in folders)
        if is_watched:
            on_operation(Operation(kind, full_path))
        return is_watched

    real_os_open, real_open, real_write, real_mkdir = os.open, io.open, os.write, os.mkdir

    def watched(function: Callable[..., Any], path_argument: int = 0) -> Callable[..., Any]:
        def watched_function(*args: Any, **options: Any) -> Any:
            # To create a folder that exists changes nothing.
            if function is not real_mkdir or not Path(args[0]).exists():
                report(function.__name__, args[path_argument], options.get("dir_fd"))
            return function(*args, **options)

        return watched_function

    def open_descriptor(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            report("open", path, options.get("dir_fd"))
        return real_os_open(path, flags, *args, **options)

    def open_file(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        is_watched = set(mode) & set("wax+") and not isinstance(file, int) and report("open", file)
        opened_file = real_open(file, mode, *args, **options)
        return _WatchedFile(opened_file, lambda: void(report("write", file))) if is_watched else opened_file

    def void(_: Any) -> None:
        """Discard a value."""

    def write(descriptor: int, data: Any) -> int:
        if not any(_full_path(descriptor, None).is_relative_to(folder) for folder in folders):
            return real_write(descriptor, data)
        half_size = real_write(descriptor, data[: len(data) // 2])
        report("write", descriptor)
        return half_size + real_write(descriptor, data[half_size:])

    # `link`, `rename` and `replace` count for the new name.
    functions = {name: watched(getattr(os, name)) for name in ("fsync", "unlink", "remove", "rmdir", "mkdir", "chmod")}
    functions |= {name: watched(getattr(os, name), 1) for name in ("replace", "rename", "link")}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(os, open=open_descriptor, write=write, **functions))
        stack.enter_context(mock.patch.object(io, "open", open_file))
        stack.enter_context(mock.patch.object(builtins, "open", open_file))
        yield


@contextmanager
def failing_operation(
    folders: Sequence[Path], failpoint: Failpoint | None, on_operation: Callable[[str, Operation], None]
) -> Iterator[None]:
    """Let the operation of a failpoint fail; `on_operation` gets each operation and the name of its thread."""
    counts = Counter[str]()

    def fail_at_point(operation: Operation) -> None:
        thread = threading.current_thread().name
        on_operation(thread, operation)
        counts[thread] += 1
        if failpoint and (thread, counts[thread]) == (failpoint.thread, failpoint.number):
            if failpoint.error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise OSError(failpoint.error, os.strerror(failpoint.error), str(operation.path))

    with watched_operations(folders, fail_at_point):
        yield
