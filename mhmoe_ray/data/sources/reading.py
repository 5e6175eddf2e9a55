"""Reader of one raw file of any format. The table shows what counts as one document in each format.

| format       | a document is                                                | read in         |
| ------------ | ------------------------------------------------------------ | --------------- |
| jsonl        | a line of JSON, for example of RedPajama-1T                  | records.py      |
| text         | a file, or a part of it between delimiter lines              | records.py      |
| redpajama-v2 | a line that passes the source's filters                      | redpajama_v2.py |
| parquet      | a row                                                        | columns.py      |
| huggingface  | a row of a folder that `save_to_disk` wrote                  | columns.py      |
| chat         | a conversation: a line of JSON or a row of Parquet           | chat.py         |
| preferences  | a pair of conversations: a line of JSON or a row of Parquet  | preferences.py  |
| webdataset   | the image and the caption of a sample in a tar file          | webdataset.py   |
| images       | an image file                                                | images.py       |
| coco         | a caption and its image, or an image with its objects        | coco.py         |
| vqa          | a question with its image and its answers                    | questions.py    |
| nlvr2        | a sentence with its two images and its label                 | questions.py    |
"""

from collections.abc import Iterator
from pkgutil import resolve_name
from typing import Protocol

from mhmoe_ray.data.chat.template import ChatTemplate, check_template
from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.images.annotations import require_image_packages
from mhmoe_ray.data.sources.items import BadLine, Document, RawFile, ReadSettings, Tally
from mhmoe_ray.data.sources.storage import Storage
from mhmoe_ray.spec import DataSpec, SourceSpec
from mhmoe_ray.spec.formats import FORMATS


class FormatReader(Protocol):
    """Function that reads the files of one format."""

    def __call__(
        self, storage: Storage, file: RawFile, source: SourceSpec, settings: ReadSettings, tally: Tally
    ) -> Iterator[Document | BadLine]:
        """Yield the documents of a file and the items that could not be read, in their order in the file.

        Damage of any kind raises no error: the reader yields a `BadLine` for it.

        Args:
            storage: the storage that holds the file.
            file: the file to read.
            source: the settings of the file's source, such as the name of the key or column that has the text.
            settings: the size limits of documents and images.
            tally: the counts for this file, of which the reader updates `bytes_read` and `dropped`.
        """


class ChatReader(Protocol):
    """Like `FormatReader`, for a format with conversations of at most `limit` bytes, which `template` renders."""

    def __call__(
        self, storage: Storage, file: RawFile, limit: int, tally: Tally, template: ChatTemplate
    ) -> Iterator[Document | BadLine]: ...


class FileReader:
    """Iterable over the documents of a file and the items that could not be read, in their order in the file.

    Damage raises no error: the iteration yields a `BadLine` for it. Without `template`, conversations are rendered by
    that of the data section, with empty start and end tokens. An unusable template, or a missing package for images, is
    a DataError.
    """

    def __init__(self, file: RawFile, spec: DataSpec, template: ChatTemplate | None = None) -> None:
        self.tally = Tally()
        """Counts of the items that have been yielded so far."""
        self._file = file
        name = source_of(file.domain)
        source, settings = spec.sources[name], ReadSettings.from_spec(spec, name)
        storage = Storage(source.path)
        traits = FORMATS[file.format]
        if traits.is_chat:
            read_conversations: ChatReader = resolve_name(traits.reader)
            template = template or check_template(spec)
            self._items = read_conversations(storage, file, settings.document_bytes, self.tally, template)
            return
        require_image_packages([source])
        read: FormatReader = resolve_name(traits.reader)
        self._items = read(storage, file, source, settings, self.tally)

    def __iter__(self) -> Iterator[Document | BadLine]:
        tally, inflation = self.tally, self._file.inflation
        for item in self._items:
            tally.text_bytes = tally.bytes_read * inflation
            if isinstance(item, Document):
                tally.documents += 1
            else:
                tally.count_bad(item)
            yield item
        # A caller that stops early never gets to this line, so only files that were read to their end are counted.
        tally.files = 1
        tally.damaged = int(any(reason.loses_lines for reason in tally.bad))
        # A reader may skip some bytes, but a finished file counts in full.
        tally.bytes_read = self._file.size
        tally.text_bytes = tally.bytes_read * inflation
