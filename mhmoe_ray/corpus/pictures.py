"""The picture sample: drawings with captions in many languages, from packages of Debian and PyPI.

    DIR/train/<artist>           drawings to train on: Noto, OpenMoji, and Tux Paint's stamps
    DIR/validation/<artist>      half of the same concepts, drawn by another artist (Gemojione)
    DIR/test/<artist>            the other half, drawn by the same artist as for validation
    DIR/licenses                 the licence text that each package contains

The folders hold WebDataset shards. A picture has the files KEY.png, KEY.txt (the English caption) and KEY.json.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path

from mhmoe_ray.corpus.artists import ARTISTS, Artist
from mhmoe_ray.corpus.captions import Concept, base_key
from mhmoe_ray.corpus.drawing_packages import PICTURE_SIZE, SPLITS, DrawingPackages, DrawingSummary
from mhmoe_ray.corpus.drawings import check_libraries
from mhmoe_ray.corpus.picture_shards import PictureWriter
from mhmoe_ray.errors import DataError

_SHARD_NAME = re.compile(r"\d{5}\.(tar|part)")


@dataclass
class PictureSummary(DrawingSummary):
    """Summary of a picture sample on disk.

    Attributes:
        pictures: number of pictures by folder below DIR.
        concepts: number of concepts that at least one picture shows.
        locales: number of locales in which at least one picture has a caption.
        captions: number of captions in all locales, of all pictures.
        shared_drawings: number of pictures, by folder, with the same bytes as an earlier picture of the artist.
    """

    pictures: dict[str, int] = field(default_factory=dict)
    concepts: int = 0
    locales: int = 0
    captions: int = 0
    shared_drawings: dict[str, int] = field(default_factory=dict)

    def describe_shortfall(self, artists: Iterable[Artist] = ARTISTS) -> str | None:
        """Return a clause for the user that names the artists without pictures; None without such artists."""
        drawing_artists = {folder.partition("/")[2] for folder in self.pictures}
        missing_artists = [artist.name for artist in artists if artist.name not in drawing_artists]
        return f"it has no pictures of {', '.join(missing_artists)}" if missing_artists else None


def write_picture_sample(
    folder: Path,
    cache: Path,
    print_line: Callable[[str], None],
    size: int = PICTURE_SIZE,
    artists: Iterable[Artist] = ARTISTS,
) -> PictureSummary:
    """Write the picture sample below `folder`, in place of an earlier one, and return its summary.

    An artist whose package cannot be downloaded or read is left out with a printed warning. Held-out artists must come
    after all others. The same packages give the same shards, byte for byte; `size` is the width and height of a picture
    in pixels. Missing Pillow or resvg-py, or a folder that cannot be written, is a DataError.
    """
    check_libraries()
    sample = _PictureSample(folder, cache, print_line, size)
    try:
        _remove_pictures(folder)
        concepts = sample.packages.attempt(sample.packages.read_concepts) or {}
        for artist in artists:
            if concepts or not artist.draws_emoji:
                sample.packages.attempt(partial(sample.add_artist, artist, concepts))
    except OSError as e:
        raise DataError(f"data sample {folder}", e.strerror or str(e), "name folders you can write") from e
    return sample.summary


def is_test_concept(key: str) -> bool:
    """Return whether the held-out pictures of a concept are for test instead of validation, which a hash decides.

    All variants of an emoji in skin tone and sex are in the same split, because they look alike.
    """
    return blake2b(base_key(key).encode(), digest_size=8).digest()[0] < 128


class _PictureSample:
    """A picture sample that is being written, with the counts of the pictures so far."""

    def __init__(self, folder: Path, cache: Path, print_line: Callable[[str], None], size: int) -> None:
        self._folder, self._size = folder, size
        self.summary = PictureSummary()
        self.packages = DrawingPackages(folder, cache, print_line, self.summary)
        self._drawn_keys, self._locales = set[str](), set[str]()

    def add_artist(self, artist: Artist, concepts: dict[str, Concept]) -> None:
        """Write an artist's drawings into the shards of their splits.

        A package that is missing, damaged or without usable drawings is a DataError.
        """
        failures, first_keys, writers = Counter[str](), dict[bytes, str](), dict[str, PictureWriter]()
        for concept, png in self.packages.read_drawings(artist, concepts, self._size, failures):
            if artist.is_held_out and concept.key not in self._drawn_keys:
                failures["not drawn for training"] += 1
                continue
            first_key = first_keys.setdefault(blake2b(png).digest(), concept.key)
            part = "train"
            if artist.is_held_out:
                # Concepts that share a drawing go to the same split, so that no drawing is in both validation and test.
                part = "test" if is_test_concept(first_key) else "validation"
            name = f"{part}/{artist.name}"
            writer = writers.setdefault(name, PictureWriter(self._folder / name))
            is_shared = first_key != concept.key
            writer.add(concept, png, artist.name, artist.package.license, first_key if is_shared else None)
            self._count_picture(name, concept, is_shared)
        for name in sorted(writers, key=lambda name: SPLITS.index(name.partition("/")[0])):
            writers[name].close()
            self.summary.pictures[name] = writers[name].picture_count
        self.packages.finish_artist(artist, sum(writer.picture_count for writer in writers.values()), failures)

    def _count_picture(self, name: str, concept: Concept, is_shared: bool) -> None:
        self._drawn_keys.add(concept.key)
        self._locales.update(concept.captions)
        self.summary.concepts, self.summary.locales = len(self._drawn_keys), len(self._locales)
        self.summary.captions += len(concept.captions)
        self.summary.shared_drawings[name] = self.summary.shared_drawings.get(name, 0) + is_shared


def _remove_pictures(folder: Path) -> None:
    """Remove the shards of an earlier sample, and the artists' folders that are then empty.

    A folder that is a link is a DataError, because its files are outside of the sample.
    """
    # A new sample that is shorter would overwrite only some of the earlier shards, so all of them are removed first.
    for part in SPLITS:
        # Only the folders of our artists are searched, because other folders may have a user's own shards, which
        # img2dataset names in the same way.
        artist_folders = [folder / part / artist.name for artist in ARTISTS]
        for path in (folder / part, *artist_folders):
            if path.is_symlink():
                fix = "remove the link, or name another folder"
                raise DataError(f"data sample {path}", "it is a link, whose files are not of the sample", fix)
        for artist_folder in filter(Path.is_dir, artist_folders):
            for path in artist_folder.iterdir():
                if _SHARD_NAME.fullmatch(path.name):
                    path.unlink()
            if not any(artist_folder.iterdir()):
                artist_folder.rmdir()
