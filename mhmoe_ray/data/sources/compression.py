"""Decompression in bounded memory which, in a damaged file, recovers everything up to the very byte of the damage.

A file's first bytes tell its compression, since names lie: RedPajama's
`en_head_0000.json.gz.dedup.classifier.jsonl.zst` is zstd, and a browser that saves a .gz may have unpacked it. Several
zstd frames or gzip members in one file are read one after another.
"""

import codecs
import re
import zlib
from collections.abc import Iterator

import zstandard

from mhmoe_ray.data.sources.items import DamageError

GZIP = b"\x1f\x8b"
ZSTD = b"\x28\xb5\x2f\xfd"
SKIPPABLE = bytes(range(0x50, 0x60))  # first byte of a zstd frame that holds no data; the other three:
_SKIPPABLE_REST = b"\x2a\x4d\x18"
_OTHERS = {
    rb"BZh[1-9]1AY&SY": "bzip2",
    rb"\xfd7zXZ": "xz",
    rb"PK\x03\x04": "zip",
    rb"\x04\x22\x4d\x18": "lz4",
    rb"PAR1\x15": "Parquet",
}
"""Names of other formats by a pattern of first bytes with which no text begins. The letters PAR1 alone could begin a
text, so the pattern includes the next byte, with which the header of a page, or that of the whole file, begins."""

OUTPUT = 1 << 20  # of gzip at a time
MOST = 1 << 16  # that gzip is given, which gives back what is not the member's
MAX_BLOCK = 1 << 17  # of zstd, RFC 8878 section 3.1.1.2.4
MAX_WINDOW = 1 << 31  # that of `zstd --long=31`, the most there is; a frame takes as much of it as it has content
_CUT = "its zstd frame is cut off"


def decompressed(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Return the decompressed content of a file in chunks.

    Args:
        chunks: the bytes of the file as stored.
        name: the file's name, which helps to tell a damaged beginning from plain text.

    Raises:
        DamageError: `chunks` raises it, or the content cannot be decompressed any further.
    """
    data = _Bytes(chunks)
    magic = data.peek(10)
    if magic.startswith(GZIP):
        return _gunzip(data)
    if _is_zstd(magic):
        return _unzstd(data)
    other = next((form for start, form in _OTHERS.items() if re.match(start, magic)), None)
    if other:
        return _damage(f"it is {other}, which is not read here")
    if name.endswith((".gz", ".zst")) and not _is_text(magic):
        return _damage(f"its name ends in .{name.rpartition('.')[2]} and its content is something else")
    return data.rest()


def _damage(reason: str) -> Iterator[bytes]:
    raise DamageError(reason)
    yield


def _is_zstd(magic: bytes) -> bool:
    return magic.startswith(ZSTD) or (magic[:1] in SKIPPABLE and magic[1:4] == _SKIPPABLE_REST and len(magic) >= 4)


def _is_text(start: bytes) -> bool:
    """Return whether bytes look like text: valid UTF-8 without control characters, not empty.

    A character may be cut off at the end. Tab, line feed and carriage return are allowed.
    """
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return len(start) > 0 and all(byte >= 0x20 or byte in b"\t\n\r" for byte in start)


class _Bytes:
    """Buffer over chunks from which any number of bytes can be taken."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._held = b""
        self._at = 0

    def take(self, count: int) -> bytes:
        """Take `count` bytes, or fewer only where the file ends."""
        while len(self._held) - self._at < count and (chunk := next(self._chunks, b"")):
            self._held, self._at = self._held[self._at :] + chunk, 0
        taken = self._held[self._at : self._at + count]
        self._at += len(taken)
        return taken

    def peek(self, count: int) -> bytes:
        taken = self.take(count)
        self._at -= len(taken)
        return taken

    def give_back(self, count: int) -> None:
        """Return the last `count` bytes that were taken to the buffer."""
        self._at -= count

    def some(self, most: int = MOST) -> bytes:
        """Take at most `most` of the buffered bytes, or of the next chunk if none are buffered.

        Return no bytes where the file ends.
        """
        if self._at == len(self._held):
            self._held, self._at = next(self._chunks, b""), 0
        return self.take(min(most, len(self._held) - self._at))

    def rest(self) -> Iterator[bytes]:
        while chunk := self.some(1 << 30):
            yield chunk


def _gunzip(data: _Bytes) -> Iterator[bytes]:
    """Decompress gzip members (RFC 1952), and skip the zero bytes that tape blocks leave after them."""
    while True:
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            chunk = data.some()
            if not chunk:
                yield member.flush()
                raise DamageError("its gzip stream is cut off")
            before = member.copy()
            try:
                yield member.decompress(chunk, OUTPUT)
            except zlib.error as e:
                yield from _to_the_damage(before, chunk)
                raise DamageError(f"its gzip stream is damaged: {_reason(e)}") from e
            data.give_back(len(member.unconsumed_tail or member.unused_data))
        while (after := data.some()) and not (after := after.lstrip(b"\0")):
            pass
        if not after:
            return
        data.give_back(len(after))
        if not data.peek(2).startswith(GZIP):
            raise DamageError("after its gzip stream comes something else")


def _to_the_damage(member: "zlib._Decompress", chunk: bytes) -> Iterator[bytes]:
    for byte in chunk:
        try:
            yield member.decompress(bytes([byte]))
        except zlib.error:
            return


def _reason(error: zlib.error) -> str:
    return str(error).rpartition(": ")[2]


def _unzstd(data: _Bytes) -> Iterator[bytes]:
    """Decompress zstd frames (RFC 8878), passing them to the library block by block.

    This way no data before a damaged block is lost, no piece inflates to more than a block, and a frame that is cut off
    is not mistaken for a complete one.
    """
    while magic := data.take(4):
        if magic[:1] in SKIPPABLE and magic[1:] == _SKIPPABLE_REST:
            left = int.from_bytes(_all(data, 4), "little")
            while left:
                left -= len(_all(data, min(left, OUTPUT)))
            continue
        if magic != ZSTD:
            raise DamageError("after its zstd frame comes something else")
        frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
        descriptor = _all(data, 1)
        flags = descriptor[0]
        single_segment, has_checksum = flags >> 5 & 1, flags >> 2 & 1
        header = (1 - single_segment) + (0, 1, 2, 4)[flags & 3] + (single_segment, 2, 4, 8)[flags >> 6]
        yield _decode(frame, magic + descriptor + _all(data, header))
        last = False
        while not last:
            block = _all(data, 3)
            fields = int.from_bytes(block, "little")
            last, kind, size = bool(fields & 1), fields >> 1 & 3, fields >> 3
            if kind == 3 or size > MAX_BLOCK:
                raise DamageError("its zstd frame is damaged: no such block")
            length = 1 if kind == 1 else size
            content = data.take(length)
            yield _decode(frame, block + content)  # of a block that is cut off, what was stored uncompressed
            if len(content) < length:
                raise DamageError(_CUT)
        if has_checksum:
            yield _decode(frame, _all(data, 4))


def _all(data: _Bytes, count: int) -> bytes:
    taken = data.take(count)
    if len(taken) < count:
        raise DamageError(_CUT)
    return taken


def _decode(frame: "zstandard.ZstdDecompressionObj", piece: bytes) -> bytes:
    try:
        return frame.decompress(piece)
    except zstandard.ZstdError as e:
        raise DamageError(f"its zstd frame is damaged: {str(e).rpartition(': ')[2]}") from e
