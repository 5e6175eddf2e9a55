"""Counting of the scans of a JPEG file without decoding it.

A decoder works through the whole image for each scan, so a small file may take hours.
"""

import re

# In the data of a scan, the byte FF is followed by 00 or by the code of a restart marker (D0 to D7), so the pattern
# excludes these. It also excludes FF, which may be repeated before any marker.
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
_FIRST_SEGMENT = 0xC0
"""Smallest code of a marker that may begin a segment; decoders skip smaller ones or end with an error."""
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = 0xD8, 0xD9, 0xDA


def count_scans(content: bytes) -> int:
    """Return the number of scans that a decoder reads from a JPEG file."""
    scans, position = 0, 0
    while (match := _MARKER.search(content, position)) and (marker := match[1][0]) != _END_OF_IMAGE:
        position = match.end()
        if marker >= _FIRST_SEGMENT and marker != _START_OF_IMAGE:
            # A segment starts with its length, by which it is skipped, because it may contain bytes that look like
            # markers, such as those of a preview in EXIF data.
            position += int.from_bytes(content[position : position + 2])
        scans += marker == _START_OF_SCAN
    return scans
