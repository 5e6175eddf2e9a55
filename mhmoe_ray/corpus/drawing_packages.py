"""Reading of the packages of a sample of drawings: concepts (the things that are drawn), drawings and licence texts."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mhmoe_ray.corpus.artists import CLDR, UNICODE_DATA, Artist
from mhmoe_ray.corpus.captions import Concept, emoji_concepts, read_emoji_table, read_locales
from mhmoe_ray.corpus.drawings import UndrawableError, square_png
from mhmoe_ray.corpus.fetch import fetch_package, read_members
from mhmoe_ray.corpus.packages import SourcePackage
from mhmoe_ray.errors import DataError

PICTURE_SIZE = 96
"""Width and height of a picture in pixels."""
SPLITS = ("train", "validation", "test")
_Result = TypeVar("_Result")


@dataclass
class DrawingSummary:
    """Counts that the summaries of the picture sample and of the scene sample have in common.

    Attributes:
        left_out: number of drawings and concepts without a picture, by artist and reason.
        downloaded: bytes that were downloaded, without packages in the cache.
        missing_packages: a line with the reason for each package that could not be downloaded or read.
    """

    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    downloaded: int = 0
    missing_packages: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the summary as `mhmoe data sample --json` prints it."""
        fields = asdict(self)
        missing_packages = fields.pop("missing_packages")
        return {**fields, "missing": missing_packages}


class DrawingPackages:
    """Reader of the packages of a sample of drawings, which writes their licence texts below the sample's folder.

    It adds downloads, missing packages and drawings without a picture to `summary`. `print_line` prints a line for each
    package and a warning for each missing one. A package in `cache` is not downloaded again.
    """

    def __init__(self, folder: Path, cache: Path, print_line: Callable[[str], None], summary: DrawingSummary) -> None:
        self._folder, self._cache, self._print_line, self._summary = folder, cache, print_line, summary

    def attempt(self, work: Callable[[], _Result]) -> _Result | None:
        """Return the result of work that needs packages; print a warning and return None if a package is unusable."""
        try:
            return work()
        except DataError as e:
            # If a download program such as apt-get is missing, every package that needs it gives the same error, and
            # one warning is enough.
            if str(e) not in self._summary.missing_packages:
                self._summary.missing_packages.append(str(e))
                self._print_line(f"warning: {e}")
            return None

    def read_concepts(self) -> dict[str, Concept]:
        """Return the concepts of all emoji by key.

        An unusable package of Unicode data, or no emoji with an English name and a class, is a DataError.
        """
        locales = read_locales(self.read_files(CLDR, copyright_path(CLDR)))
        table_files = self.read_files(UNICODE_DATA, copyright_path(UNICODE_DATA))
        table = read_emoji_table(b"\n".join(table_files.values()).decode("utf-8"))
        concepts = emoji_concepts(locales, table)
        if not concepts:
            raise DataError("captions of emoji", "none has an English name and a class", "go on without emoji")
        self._print_line(f"captions of {len(concepts):,} emoji in {len(locales)} locales")
        return concepts

    def read_drawings(
        self, artist: Artist, concepts: Mapping[str, Concept], size: int, failures: Counter[str]
    ) -> Iterator[tuple[Concept, bytes]]:
        """Yield an artist's concepts, each with a PNG file of `size` pixels square, sorted by key.

        Undrawable concepts are counted in `failures` by reason. A missing or damaged package is a DataError.
        """
        files = self.read_files(artist.package, artist.license_file)
        for concept, image in artist.read_drawings(files, concepts, size, failures):
            try:
                yield concept, square_png(image, size)
            except UndrawableError as e:
                failures[str(e)] += 1

    def finish_artist(self, artist: Artist, picture_count: int, failures: Mapping[str, int]) -> None:
        """Add an artist's left-out drawings to the summary, and print the number of pictures.

        No pictures are a DataError, for example because a newer package has another layout.
        """
        if reasons := {reason: count for reason, count in sorted(failures.items()) if count}:
            self._summary.left_out[artist.name] = reasons
        if not picture_count:
            raise DataError(
                f"package {artist.package.name}",
                "there are no drawings that the sample can use",
                "go on without it",
            )
        self._print_line(f"{artist.name}: {picture_count:,} pictures")

    def read_files(self, package: SourcePackage, license_file: str) -> dict[str, bytes]:
        """Fetch a package, write its licence text into the sample, and return the package's selected files by path.

        A package that cannot be downloaded or is damaged is a DataError.
        """
        fetched = fetch_package(package, self._cache)
        self._summary.downloaded += fetched.downloaded_bytes
        files = dict(
            read_members(fetched.path, lambda path: path == license_file or bool(package.files.fullmatch(path)))
        )
        license_folder = self._folder / "licenses"
        license_folder.mkdir(parents=True, exist_ok=True)
        license_name = package.name.partition("==")[0]
        (license_folder / f"{license_name}.txt").write_bytes(files.pop(license_file, b""))
        return files


def copyright_path(package: SourcePackage) -> str:
    """Return the path of the licence text in a package of Debian."""
    return f"usr/share/doc/{package.name}/copyright"
