"""Fetching of packages by name into a cache, with the machine's own clients, and reading of files in them in one pass.

Nothing is installed or unpacked to disk, and no script of a package runs.
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

from mhmoe_ray.corpus.packages import Origin, Package
from mhmoe_ray.errors import DataError


@dataclass(frozen=True)
class Fetched:
    """A package in the cache; `bytes` is the size of what was downloaded for it now, 0 if it was in the cache."""

    path: Path
    version: str
    bytes: int


def client(origin: Origin) -> list[str] | None:
    """Return the command that downloads a package of an origin into the working directory; None if there is no
    client."""
    if origin == "PyPI":
        pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else [shutil.which("pip") or ""]
        # Wheels only: the set-up of a source archive is code that would run here.
        options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
        return [*pip, "download", *options] if pip != [""] else None
    apt = shutil.which("apt-get")
    # Without these two, root's apt-get keeps an index of its lists outside our cache.
    return [apt, "download", "-qq", "-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache="] if apt else None


def fetch(package: Package, cache: Path) -> Fetched:
    """Return the package's file from the cache, or download the newest version that the client knows.

    Raises:
        DataError: the package cannot be downloaded.
    """
    folder = cache / package.origin
    there = _find(package, folder)
    if there:
        return Fetched(there, _version(there), 0)
    command = client(package.origin)
    what = f"package {package.name} of {package.origin}"
    if command is None:
        name = "pip" if package.origin == "PyPI" else "apt-get"
        raise DataError(
            f"packages of {package.origin}", f"there is no {name} here", f"those that are not in {folder} are left out"
        )
    # A folder of its own, so that only a whole file gets into the cache.
    unfinished = folder / f"{package.name}.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    done = subprocess.run([*command, package.name], cwd=unfinished, capture_output=True, text=True, check=False)
    file = next(unfinished.iterdir(), None)
    if done.returncode or file is None:
        shutil.rmtree(unfinished)
        told = re.findall(r"(?m)^(?:E|ERROR): (.*)", done.stderr) or done.stderr.splitlines() or ["no reason given"]
        fix = "look at the network" if package.origin == "PyPI" else "look at the network, or run apt-get update"
        raise DataError(what, told[0].rstrip(". "), fix)
    path = file.rename(folder / file.name)
    unfinished.rmdir()
    return Fetched(path, _version(path), path.stat().st_size)


def _find(package: Package, folder: Path) -> Path | None:
    name, _, version = package.name.partition("==")
    if package.origin == "Debian":
        return next(iter(sorted(folder.glob(f"{name}_*.deb"))), None)
    return next(iter(sorted(folder.glob(f"{name.lower()}-{version}-*.whl"))), None)


def _version(path: Path) -> str:
    """Return the version in the name of a package's file: name_1%3a2.0-1_all.deb, name-2.0-py3-none-any.whl."""
    return unquote(path.name.split("_")[1] if path.suffix == ".deb" else path.name.split("-")[1])


LARGEST = 100_000_000
"""Largest size in bytes of a file in a package; a larger file holds no text for the corpus."""


def read_members(package: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of the plain files whose path is wanted, in the package's order, with gzip decompressed.

    Args:
        package: the path of a .deb or a wheel.
        wanted: a function that returns whether the file with a path is wanted.

    Raises:
        DataError: the package is damaged, or there is no dpkg-deb to read a .deb with.
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
