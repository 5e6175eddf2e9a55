"""Files out of a package, read in one pass: nothing is unpacked to disk, and no script in it runs."""

import gzip
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from mhmoe_ray.errors import DataError

LARGEST = 100_000_000
"""Bytes of a file in a package; a larger one is no text of ours."""


def read_members(package: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Path and content of the plain files whose path is wanted, in the package's order; gzip is undone.

    Args:
        package: a .deb, or a wheel.

    Raises:
        DataError: it is damaged, or there is no dpkg-deb to read a .deb with.
    """
    members = _debian if package.suffix == ".deb" else _wheel
    try:
        for name, content in members(package, wanted):
            yield name, gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, OSError) as e:
        raise DataError(f"package {package}", f"it cannot be read ({e})", "delete it to have it fetched anew") from e


def _debian(package: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    if not shutil.which("dpkg-deb"):
        raise DataError(f"package {package}", "there is no dpkg-deb to read it with", "install dpkg")
    command = ["dpkg-deb", "--fsys-tarfile", str(package.absolute())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                for member in tar:
                    name = member.name.removeprefix("./")
                    if member.isreg() and member.size <= LARGEST and wanted(name):
                        file = tar.extractfile(member)
                        assert file
                        yield name, file.read()
            process.stdout.read()
        finally:
            process.stdout.close()  # ends dpkg-deb where the reader stops early
    if process.returncode:
        raise tarfile.ReadError(f"dpkg-deb ended with {process.returncode}")


def _wheel(package: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(package) as wheel:
        for member in wheel.infolist():
            if not member.is_dir() and member.file_size <= LARGEST and wanted(member.filename):
                yield member.filename, wheel.read(member)
