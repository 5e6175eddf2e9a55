"""Members of a tar file, read as a stream in bounded memory.

The formats are those of POSIX (ustar and pax) and GNU. Unlike the standard library's reader, this one reports an
archive that ends without its end mark, or whose headers are damaged, instead of stopping there without an error.
"""

import tarfile
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from mhmoe_ray.data.sources.compression import ByteBuffer
from mhmoe_ray.data.sources.items import DamageError

_BLOCK_BYTES = tarfile.BLOCKSIZE
# A larger extra header, such as one with a long name, counts as damaged. The limit is far above any path's length, and
# bounds the memory.
_MAX_HEADER_BYTES = 1 << 20


MemberKind = Literal["file", "folder", "other"]
"""Kind of a member of a tar file; `other` is a link, a device or a sparse file."""


class TarMember(NamedTuple):
    """Member of a tar file, with its number in the file from 1."""

    number: int
    name: str
    size: int
    kind: MemberKind
    content: bytes | None
    """Content; None if the member is not a file, was not selected, or is larger than the limit."""


def read_members(chunks: Iterator[bytes], is_selected: Callable[[str], bool], limit: int) -> Iterator[TarMember]:
    """Yield the members of a decompressed tar file, with the content of selected files of up to `limit` bytes.

    A damaged tar file raises DamageError after all members before the damage were yielded.
    """
    # `ByteBuffer` takes an empty chunk for the end of the file, but decompression may yield one anywhere.
    data = ByteBuffer(chunk for chunk in chunks if chunk)
    number, extra_fields = 0, dict[str, str]()
    while True:
        header = _read_header(data, number)
        if header is None:
            break
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            extra_fields |= _pax_fields(_read_extra_header(data, header))
            continue
        if header.type == tarfile.GNUTYPE_LONGNAME:
            extra_fields["path"] = _decode_name(_read_extra_header(data, header).rstrip(b"\0"))
            continue
        if header.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            _skip(data, header.size)
            _skip_padding(data, header.size)
            continue
        number += 1
        name, size = extra_fields.get("path", header.name), _parse_size(extra_fields, header.size)
        extra_fields = {}
        # Headers of links, folders and devices may have a size, but no content follows them.
        if not (header.isreg() or header.type not in tarfile.SUPPORTED_TYPES):
            yield TarMember(number, name, 0, "folder" if header.isdir() else "other", None)
            continue
        kind: MemberKind = "file" if header.isreg() and not header.issparse() else "other"
        if kind == "file" and size <= limit and is_selected(name):
            content: bytes | None = b"".join(_take(data, size))
        else:
            content = None
            _skip(data, size)
        # A member is complete even if the bytes that fill its last block are cut off.
        yield TarMember(number, name, size, kind, content)
        _skip_padding(data, size)
    for chunk in data.remaining_chunks():
        if chunk.strip(b"\0"):
            raise DamageError("its end mark is followed by other bytes")


def _read_header(data: ByteBuffer, number: int) -> tarfile.TarInfo | None:
    """Return the next header, or None at the end mark; damage after `number` members is a DamageError."""
    block = data.take(_BLOCK_BYTES)
    if len(block) < _BLOCK_BYTES:
        raise DamageError(f"it is cut off after {number:,} members")
    if not block.strip(b"\0"):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    # `frombuf` raises a ValueError if a number in the header is damaged.
    except (tarfile.HeaderError, ValueError) as e:
        reason = f"the header after {number:,} members is damaged" if number else "it is not a tar file"
        raise DamageError(reason) from e


def _read_extra_header(data: ByteBuffer, header: tarfile.TarInfo) -> bytes:
    """Return the content of an extra header, which describes the next member, for example by a long name."""
    if header.size > _MAX_HEADER_BYTES:
        raise DamageError(f"a header of {header.size:,} bytes is damaged")
    content = b"".join(_take(data, header.size))
    _skip_padding(data, header.size)
    return content


def _pax_fields(content: bytes) -> dict[str, str]:
    """Return the fields of a pax header, whose records are `length key=value` and a newline."""
    fields, start = {}, 0
    try:
        while content[start:].strip(b"\0"):
            length = int(content[start : content.index(b" ", start)])
            record = content[start : start + length]
            if not record.endswith(b"\n"):
                raise ValueError
            key, _, value = record.partition(b" ")[2][:-1].partition(b"=")
            fields[_decode_name(key)] = _decode_name(value)
            start += length
    except ValueError as e:
        raise DamageError("a pax header is damaged") from e
    return fields


def _parse_size(fields: dict[str, str], header_size: int) -> int:
    try:
        return int(fields.get("size", header_size))
    except ValueError as e:
        raise DamageError("a pax header is damaged") from e


def _decode_name(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _take(data: ByteBuffer, count: int) -> Iterator[bytes]:
    """Yield the next `count` bytes in pieces; raise DamageError if the tar file ends too early."""
    while count > 0:
        piece = data.take_available(count)
        if not piece:
            raise DamageError("it is cut off within a member")
        count -= len(piece)
        yield piece


def _skip(data: ByteBuffer, size: int) -> None:
    for _ in _take(data, size):
        pass


def _skip_padding(data: ByteBuffer, size: int) -> None:
    for _ in _take(data, -size % _BLOCK_BYTES):
        pass
