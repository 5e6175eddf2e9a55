"""The image sample: drawings with captions in many languages, from packages of Debian and PyPI.

    DIR/train/<artist>           drawings to train on: Noto, OpenMoji, and Tux Paint's stamps
    DIR/validation/<artist>      half of the same concepts, drawn by another artist (Gemojione)
    DIR/test/<artist>            the other half, drawn by the same artist as for validation
    DIR/licenses                 the licence text that each package contains

The folders hold WebDataset shards. An image has the files KEY.png, KEY.txt (the English caption) and KEY.json.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from mhmoe_ray.corpus.artists import ARTISTS, Artist
from mhmoe_ray.corpus.captions import Concept, base_key
from mhmoe_ray.corpus.drawings import LeftOutError, check_libraries
from mhmoe_ray.corpus.sample import IMAGE_SIZE, SPLITS, DrawingSample, DrawingSummary
from mhmoe_ray.corpus.shards import ImageShardWriter, remove_files
from mhmoe_ray.errors import DataError


@dataclass
class ImageSummary(DrawingSummary):
    """Summary of an image sample on disk.

    Attributes:
        pictures: number of images by folder below DIR.
        concepts: number of concepts that at least one image shows.
        locales: number of locales in which at least one image has a caption.
        captions: number of captions in all locales, of all images.
        shared_drawings: number of images, by folder, with the same bytes as an earlier image of the artist.
    """

    pictures: dict[str, int] = field(default_factory=dict)
    concepts: int = 0
    locales: int = 0
    captions: int = 0
    shared_drawings: dict[str, int] = field(default_factory=dict)

    def describe_shortfall(self, artists: Iterable[Artist] = ARTISTS) -> str | None:
        """Return a clause for the user that names the artists without images; None without such artists."""
        drawing_artists = {folder.partition("/")[2] for folder in self.pictures}
        missing_artists = [artist.name for artist in artists if artist.name not in drawing_artists]
        return f"it has no images of {', '.join(missing_artists)}" if missing_artists else None


def write_image_sample(
    folder: Path,
    cache: Path,
    print_line: Callable[[str], None],
    size: int = IMAGE_SIZE,
    artists: Iterable[Artist] = ARTISTS,
) -> ImageSummary:
    """Write the image sample below `folder`, in place of an earlier one, and return its summary.

    An artist whose package cannot be downloaded or read is left out with a printed warning. Held-out artists must come
    after all others. The same packages give the same shards, byte for byte; `size` is the width and height of an image
    in pixels. Missing Pillow or resvg-py, or a folder that cannot be written, is a DataError.
    """
    check_libraries()
    sample = _ImageSample(folder, cache, print_line, size)
    try:
        _remove_images(folder)
        sample.add_artists(artists)
    except OSError as e:
        raise DataError(f"data sample {folder}", e.strerror or str(e), "name folders you can write") from e
    return sample.summary


def is_test_concept(key: str) -> bool:
    """Return whether the held-out images of a concept are for test instead of validation, which a hash decides.

    All variants of an emoji in skin tone and sex are in the same split, because they look alike.
    """
    return blake2b(base_key(key).encode(), digest_size=8).digest()[0] < 128


class _ImageSample(DrawingSample):
    """An image sample that is being written."""

    def __init__(self, folder: Path, cache: Path, print_line: Callable[[str], None], size: int) -> None:
        super().__init__(folder, cache, print_line, size)
        self.summary: ImageSummary = ImageSummary()
        self._drawn_keys, self._locales = set[str](), set[str]()
        # Key of the first concept with each drawing, by artist and hash of the drawing.
        self._first_keys = dict[tuple[str, bytes], str]()
        self._writers = dict[str, ImageShardWriter]()

    def add_drawing(self, artist: Artist, concept: Concept, png: bytes) -> None:
        """Write a drawing into a shard of its split."""
        if artist.is_held_out and concept.key not in self._drawn_keys:
            raise LeftOutError("not drawn for training")
        first_key = self._first_keys.setdefault((artist.name, blake2b(png).digest()), concept.key)
        split = "train"
        if artist.is_held_out:
            # Concepts that share a drawing go to the same split, so that no drawing is in both validation and test.
            split = "test" if is_test_concept(first_key) else "validation"
        name = f"{split}/{artist.name}"
        writer = self._writers.setdefault(name, ImageShardWriter(self.folder / name))
        is_shared = first_key != concept.key
        writer.add(concept, png, artist.name, artist.package.license, first_key if is_shared else None)
        self._drawn_keys.add(concept.key)
        self._locales.update(concept.captions)
        self.summary.concepts, self.summary.locales = len(self._drawn_keys), len(self._locales)
        self.summary.captions += len(concept.captions)
        self.summary.shared_drawings[name] = self.summary.shared_drawings.get(name, 0) + is_shared

    def finish_artist(self, artist: Artist) -> None:
        """Finish the artist's shards."""
        for name in (f"{split}/{artist.name}" for split in SPLITS):
            if name in self._writers:
                self._writers[name].close()
                self.summary.pictures[name] = self._writers[name].count


def _remove_images(folder: Path) -> None:
    """Remove the shards of an earlier sample, and the artists' folders that are then empty.

    A folder that is a link is a DataError, because its files are outside of the sample.
    """
    for split in SPLITS:
        # Only the folders of our artists are searched, because other folders may have a user's own shards, which
        # img2dataset names in the same way.
        artist_folders = [folder / split / artist.name for artist in ARTISTS]
        for path in (folder / split, *artist_folders):
            if path.is_symlink():
                fix = "remove the link, or name another folder"
                raise DataError(f"data sample {path}", "it is a link, whose files are not of the sample", fix)
        for artist_folder in artist_folders:
            remove_files(artist_folder, r"\d{5}\.(tar|part)")
