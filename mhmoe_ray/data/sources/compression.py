"""Decompression in bounded memory, which recovers all bytes before the damage from a damaged file.

A file's first bytes determine its compression, since names are unreliable: RedPajama's
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
# A skippable zstd frame begins with one of these bytes and the three bytes of `_SKIPPABLE_REST`, and has no content
# (RFC 8878 section 3.1.2).
SKIPPABLE_FIRST_BYTES = bytes(range(0x50, 0x60))
_SKIPPABLE_REST = b"\x2a\x4d\x18"
_OTHER_FORMATS = {
    rb"BZh[1-9]1AY&SY": "bzip2",
    rb"\xfd7zXZ": "xz",
    rb"PK\x03\x04": "zip",
    rb"\x04\x22\x4d\x18": "lz4",
    rb"PAR1\x15": "Parquet",
}
"""Names of unsupported formats, by a pattern of their first bytes with which no text begins. PAR1 alone could begin a
text, so its pattern includes the first byte of a page header."""

# gzip produces at most this many bytes of output per call, so that a small input cannot fill the memory.
OUTPUT_BYTES = 1 << 20
# gzip gets at most this many bytes of input per call. The number is small, because each call copies the input bytes
# that it does not use, such as those after the end of a member; they go back to the buffer.
INPUT_BYTES = 1 << 16
# RFC 8878 section 3.1.1.2.4 limits a zstd block to this size.
MAX_BLOCK = 1 << 17
# This is the largest window size that is accepted: that of `zstd --long=31`, the largest that exists. A frame needs
# only as much of its window as it has content.
MAX_WINDOW = 1 << 31
_CUT_OFF_REASON = "its zstd frame is cut off"
MAX_INFLATION = 100
"""Largest ratio of the content of a file that is read at once to the file's size; text has about a tenth of it."""
MIN_CONTENT_LIMIT = 64 << 20
"""Bytes of content that any file may have that is read at once."""


def decompress(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Yield the content of a file in chunks, decompressed if its first bytes are those of gzip or zstd.

    The name helps to distinguish a damaged beginning from plain text. Content that cannot be decompressed, in full or
    in part, is a DamageError, which `chunks` may raise as well.
    """
    data = ByteBuffer(chunks)
    magic = data.peek(10)
    if magic.startswith(GZIP):
        return _gunzip(data)
    if _is_zstd(magic):
        return _unzstd(data)
    other_format = next(
        (format_name for pattern, format_name in _OTHER_FORMATS.items() if re.match(pattern, magic)), None
    )
    if other_format:
        return _raise_damage(f"it is {other_format}, which is not supported")
    if name.endswith((".gz", ".zst")) and not _is_text(magic):
        return _raise_damage(f"its name ends in .{name.rpartition('.')[2]}, but its content has another format")
    return data.remaining_chunks()


def decompress_at_once(chunks: Iterator[bytes], name: str, file_size: int) -> bytes:
    """Return the content of a file; a DamageError above MAX_INFLATION times `file_size` and MIN_CONTENT_LIMIT bytes."""
    limit = max(MIN_CONTENT_LIMIT, MAX_INFLATION * file_size)
    pieces, content_size = list[bytes](), 0
    for piece in decompress(chunks, name):
        content_size += len(piece)
        if content_size > limit:
            raise DamageError(f"it unpacks to more than {limit:,} bytes, the limit for its size")
        pieces.append(piece)
    return b"".join(pieces)


def _raise_damage(reason: str) -> Iterator[bytes]:
    raise DamageError(reason)
    # This unreachable statement makes the function a generator, so that the error is raised on iteration.
    yield


def _is_zstd(magic: bytes) -> bool:
    return magic.startswith(ZSTD) or _is_skippable(magic)


def _is_skippable(magic: bytes) -> bool:
    return magic[1:4] == _SKIPPABLE_REST and magic[0] in SKIPPABLE_FIRST_BYTES


def _is_text(start: bytes) -> bool:
    """Return whether a file's first bytes are UTF-8, perhaps cut off, without control characters but tab, LF, CR."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return len(start) > 0 and all(byte >= 0x20 or byte in b"\t\n\r" for byte in start)


class ByteBuffer:
    """Buffer over an iterator of byte chunks, from which any number of bytes can be taken."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._buffer = b""
        self._offset = 0

    def take(self, count: int) -> bytes:
        """Remove and return the next `count` bytes; fewer at the end of the file."""
        while len(self._buffer) - self._offset < count and (chunk := next(self._chunks, b"")):
            self._buffer, self._offset = self._buffer[self._offset :] + chunk, 0
        content = self._buffer[self._offset : self._offset + count]
        self._offset += len(content)
        return content

    def peek(self, count: int) -> bytes:
        """Return the next `count` bytes without taking them; fewer at the end of the file."""
        content = self.take(count)
        self._offset -= len(content)
        return content

    def give_back(self, count: int) -> None:
        """Put the `count` bytes that were taken last back into the buffer."""
        self._offset -= count

    def take_available(self, limit: int = INPUT_BYTES) -> bytes:
        """Take up to `limit` bytes of the buffer, or of the next chunk if it is empty; b"" at the file's end."""
        if self._offset == len(self._buffer):
            self._buffer, self._offset = next(self._chunks, b""), 0
        return self.take(min(limit, len(self._buffer) - self._offset))

    def remaining_chunks(self) -> Iterator[bytes]:
        """Yield all bytes that have not been taken."""
        while chunk := self.take_available(1 << 30):
            yield chunk


def _gunzip(data: ByteBuffer) -> Iterator[bytes]:
    """Yield the content of gzip members (RFC 1952), skipping zero bytes after a member as padding.

    A damaged stream raises DamageError after all content before the damage was yielded.
    """
    while True:
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            chunk = data.take_available()
            if not chunk:
                yield member.flush()
                raise DamageError("its gzip stream is cut off")
            # A call of zlib that fails returns no output. So the state is saved before each call, and after a failure
            # the chunk is decompressed again byte by byte.
            saved_member = member.copy()
            try:
                yield member.decompress(chunk, OUTPUT_BYTES)
            except zlib.error as e:
                yield from _decompress_to_damage(saved_member, chunk)
                raise DamageError(f"its gzip stream is damaged: {_zlib_reason(e)}") from e
            data.give_back(len(member.unconsumed_tail or member.unused_data))
        while (next_chunk := data.take_available()) and not (next_chunk := next_chunk.lstrip(b"\0")):
            pass
        if not next_chunk:
            return
        data.give_back(len(next_chunk))
        if not data.peek(2).startswith(GZIP):
            raise DamageError("its gzip stream is followed by other bytes")


def _decompress_to_damage(member: "zlib._Decompress", chunk: bytes) -> Iterator[bytes]:
    """Yield the content of a damaged gzip chunk before the damage, by decompressing it byte by byte."""
    for byte in chunk:
        try:
            yield member.decompress(bytes([byte]))
        except zlib.error:
            return


def _zlib_reason(error: zlib.error) -> str:
    return str(error).rpartition(": ")[2]


def _unzstd(data: ByteBuffer) -> Iterator[bytes]:
    """Yield the content of zstd frames (RFC 8878), block by block.

    A damaged frame raises DamageError after all content before the damage was yielded.
    """
    # The library gets one block at a time. So no data before a damaged block is lost, no call returns more data than
    # one block has, and a frame that is cut off is not mistaken for a complete one.
    while magic := data.take(4):
        if _is_skippable(magic):
            remaining_bytes = int.from_bytes(_take_exactly(data, 4), "little")
            while remaining_bytes:
                remaining_bytes -= len(_take_exactly(data, min(remaining_bytes, OUTPUT_BYTES)))
            continue
        if magic != ZSTD:
            raise DamageError("its zstd frame is followed by other bytes")
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
        descriptor = _take_exactly(data, 1)
        flags = descriptor[0]
        single_segment, has_checksum = flags >> 5 & 1, flags >> 2 & 1
        # The header may have a window descriptor, a dictionary id and the content size. The flags tell their sizes (RFC
        # 8878 section 3.1.1.1).
        header_size = (1 - single_segment) + (0, 1, 2, 4)[flags & 3] + (single_segment, 2, 4, 8)[flags >> 6]
        yield _decompress_piece(decompressor, magic + descriptor + _take_exactly(data, header_size))
        is_last_block = False
        while not is_last_block:
            block_header = _take_exactly(data, 3)
            fields = int.from_bytes(block_header, "little")
            is_last_block, block_type, size = bool(fields & 1), fields >> 1 & 3, fields >> 3
            if block_type == 3 or size > MAX_BLOCK:
                raise DamageError("its zstd frame is damaged: no such block")
            stored_size = 1 if block_type == 1 else size
            content = data.take(stored_size)
            # A block that is cut off is decompressed all the same: if its bytes were stored uncompressed, those before
            # the cut are not lost.
            yield _decompress_piece(decompressor, block_header + content)
            if len(content) < stored_size:
                raise DamageError(_CUT_OFF_REASON)
        if has_checksum:
            yield _decompress_piece(decompressor, _take_exactly(data, 4))


def _take_exactly(data: ByteBuffer, count: int) -> bytes:
    content = data.take(count)
    if len(content) < count:
        raise DamageError(_CUT_OFF_REASON)
    return content


def _decompress_piece(decompressor: "zstandard.ZstdDecompressionObj", piece: bytes) -> bytes:
    try:
        return decompressor.decompress(piece)
    except zstandard.ZstdError as e:
        raise DamageError(f"its zstd frame is damaged: {str(e).rpartition(': ')[2]}") from e
