"""Packages by name into a cache, with the clients that a machine has; nothing is installed."""

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from mhmoe_ray.data.corpus.packages import Origin, Package
from mhmoe_ray.errors import DataError


@dataclass(frozen=True)
class Fetched:
    """A package in the cache. `bytes` were downloaded for it now: none if it was there."""

    path: Path
    version: str
    bytes: int


def client(origin: Origin) -> list[str] | None:
    """The command that downloads from there into the folder it runs in; None where it is missing."""
    if origin == "PyPI":
        pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else [shutil.which("pip") or ""]
        # Wheels only: the set-up of a source archive is code that would run here.
        options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
        return [*pip, "download", *options] if pip != [""] else None
    apt = shutil.which("apt-get")
    # Without these two, root's apt-get keeps an index of its lists outside our cache.
    return [apt, "download", "-qq", "-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache="] if apt else None


def fetch(package: Package, cache: Path) -> Fetched:
    """The package's file: the newest its client knows of, unless the cache has one.

    Raises:
        DataError: it cannot be had.
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
    """name_1%3a2.0-1_all.deb, name-2.0-py3-none-any.whl"""
    return unquote(path.name.split("_")[1] if path.suffix == ".deb" else path.name.split("-")[1])
