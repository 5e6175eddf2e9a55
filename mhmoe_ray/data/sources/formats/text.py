"""Plain text: a file is a document, or one of its parts between delimiter lines.

A byte order mark and the last line break are not part of a document; CR LF becomes LF. A NUL byte says that it is no
text. Between delimiters blank parts are passed over; a blank file is told.
"""

from collections.abc import Iterator

from mhmoe_ray.data.sources.compression import decompressed
from mhmoe_ray.data.sources.items import BadLine, DamageError, Document, RawFile, Reason, Tally
from mhmoe_ray.data.sources.lines import lines
from mhmoe_ray.data.sources.records import BOM
from mhmoe_ray.data.sources.storage import Storage
from mhmoe_ray.spec import SourceSpec


def read_text(
    storage: Storage, file: RawFile, source: SourceSpec, limit: int, tally: Tally
) -> Iterator[Document | BadLine]:
    """See `formats.Read`."""
    part = _Part(file.path, limit)
    end = None if source.delimiter is None else source.delimiter.encode()
    number = 0
    try:
        for number, line in enumerate(lines(decompressed(storage.chunks(file, tally), file.path), limit), start=1):
            if number == 1 and line is not None:
                line = line.removeprefix(BOM)
            if line is not None and line.removesuffix(b"\r") == end:
                yield from part.finish()
                part = _Part(file.path, limit)
            else:
                part.add(number, line)
    except DamageError as damage:
        yield BadLine(file.path, part.first or number + 1, Reason.LOST, damage.reason)
        return
    made = list(part.finish())
    yield from made or ([BadLine(file.path, 1, Reason.EMPTY)] if end is None else [])


class _Part:
    """The lines of one document."""

    def __init__(self, path: str, limit: int) -> None:
        self._path, self._limit = path, limit
        self._lines: list[bytes] = []
        self._length = 0  # with a newline for each line
        self._too_long = False
        self.first = 0
        """Number of its first line, 0 before there is one."""

    def add(self, number: int, line: bytes | None) -> None:
        self.first = self.first or number
        self._length += len(line or b"") + 1
        if line is None or self._too_long or self._length - 1 > self._limit:
            self._too_long = True
            self._lines.clear()
        else:
            self._lines.append(line)

    def finish(self) -> Iterator[Document | BadLine]:
        """Nothing for a part that is blank: delimiters may follow one another."""
        if self._too_long:
            yield BadLine(self._path, self.first, Reason.TOO_LONG)
            return
        data = b"\n".join(line.removesuffix(b"\r") for line in self._lines)
        if b"\0" in data:
            yield BadLine(self._path, self.first, Reason.NUL_BYTES)
            return
        try:
            text = data.decode()
        except UnicodeDecodeError as e:
            bad = self.first + data.count(b"\n", 0, e.start)
            yield BadLine(self._path, self.first, Reason.NOT_UTF8, f"line {bad}")
            return
        if text.strip():
            yield Document(text, self.first)
