"""Lines of a stream of bytes, in memory for the longest line allowed and one chunk."""

from collections.abc import Iterable, Iterator

from mhmoe_ray.data.sources.items import DamageError


def lines(chunks: Iterable[bytes], limit: int) -> Iterator[bytes | None]:
    """Each line without its newline; None in place of one that is longer than `limit` bytes.

    Raises:
        DamageError: of `chunks`, with the beginning of the line that it cut, if that is within the limit.
    """
    held: list[bytes] = []  # pieces of a line that began in an earlier chunk
    length = 0  # of that line, whose pieces are dropped once it is too long
    try:
        for chunk in chunks:
            *whole, rest = chunk.split(b"\n")
            if whole:
                length += len(whole[0])
                yield b"".join([*held, whole[0]]) if length <= limit else None
                for i in range(1, len(whole)):
                    yield whole[i] if len(whole[i]) <= limit else None
                held, length = [], 0
            if rest:
                length += len(rest)
                held.append(rest)
                if length > limit:
                    held.clear()
    except DamageError as damage:
        damage.rest = b"".join(held)
        raise
    if length:
        yield b"".join(held) if length <= limit else None
