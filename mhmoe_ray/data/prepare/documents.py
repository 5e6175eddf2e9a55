"""The documents of a shard that is packed, for its index (data/shards/documents.py)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mhmoe_ray.data.prepare.parts import PartRecord, PartSlice, part_file, record_file
from mhmoe_ray.data.shards.documents import DocumentPieces
from mhmoe_ray.storage import Location


class ShardDocuments(NamedTuple):
    """Documents with tokens or rows in a shard, in the order of the shard."""

    starts: np.ndarray
    """First token or row of each document in the shard; negative for one that begins before it."""
    files: pa.DictionaryArray
    lines: np.ndarray
    line_counts: np.ndarray

    @classmethod
    def of_slices(cls, folder: Location, slices: Sequence[PartSlice]) -> "ShardDocuments":
        """Return the documents of slices of the parts in a folder, which together are a shard."""
        starts, files, lines, line_counts = [list[np.ndarray](), list[str](), list[np.ndarray](), list[np.ndarray]()]
        shard_start = 0
        for part in slices:
            record = PartRecord.model_validate_json(record_file(part_file(folder, part.name)).read_bytes())
            lengths = np.array(record.lengths, np.int64)
            ends = np.cumsum(lengths)
            documents = np.flatnonzero((ends > part.start) & (ends - lengths < part.stop))
            starts.append((ends - lengths)[documents] - part.start + shard_start)
            names = (f"/{record.names[i]}" if record.names and record.names[i] else "" for i in documents)
            files += [part.path + name for name in names]
            lines.append(np.array(record.lines, np.int64)[documents] + part.first_line)
            line_counts.append(np.array(record.line_counts, np.int64)[documents])
            shard_start += part.length
        return cls(
            np.concatenate(starts),
            pa.array(files, pa.string()).dictionary_encode(),
            np.concatenate(lines),
            np.concatenate(line_counts),
        )

    def pieces(self, sample: np.ndarray, offset: np.ndarray, document: np.ndarray) -> DocumentPieces:
        """Return the pieces of an index from the document of each, by its number in the shard."""
        return DocumentPieces(
            sample, offset, self.files.take(pa.array(document)), self.lines[document], self.line_counts[document]
        )

    def cut(self, samples: int, seq_len: int) -> DocumentPieces:
        """Return the pieces of documents that are cut wherever a sample of `seq_len` inputs, or a row (1), ends."""
        inner_starts = self.starts[(self.starts > 0) & (self.starts < samples * seq_len)]
        piece_starts = np.union1d(np.arange(samples) * seq_len, inner_starts)
        document = np.searchsorted(self.starts, piece_starts, side="right") - 1
        return self.pieces(*np.divmod(piece_starts, seq_len), document)
