"""Writers of packages for tests: a .deb is an ar archive of three members, a wheel is a zip archive."""

import io
import re
import tarfile
import zipfile
from pathlib import Path

from mhmoe_ray.corpus.packages import Package
from mhmoe_ray.corpus.readers import page_reader
from mhmoe_ray.data.sources import Document
from tests.data.sources.read import read_source

PAGES = page_reader("//body")


def make_package(origin: str, name: str, files: str, reader=PAGES, domain: str = "c4") -> Package:
    """Return the description of a package; `files` is a regular expression for the paths of its files that are read."""
    return Package(origin, name, "MIT", re.compile(files), reader, domain)


def pack_tar(files: dict[str, bytes], compression: str = "xz", links: dict[str, str] | None = None) -> bytes:
    """Return a compressed tar archive of files, and of symbolic links with their targets."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(f"./{name}")
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return buffer.getvalue()


def write_deb(
    path: Path, files: dict[str, bytes], compression: str = "xz", links: dict[str, str] | None = None
) -> Path:
    """Write a Debian package with these files and symbolic links, and return its path."""
    control = b"Package: p\nVersion: 1\nArchitecture: all\nMaintainer: A <a@example.org>\nDescription: d\n"
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": pack_tar({"control": control, "postinst": b"#!/bin/sh\nexit 1\n"}, "gz"),
        f"data.tar.{compression}": pack_tar(files, compression, links),
    }
    archive = b"!<arch>\n"
    for name, content in members.items():
        archive += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        archive += content + b"\n" * (len(content) % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(archive)
    return path


def write_wheel(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return path


def html_page(*paragraphs: str) -> bytes:
    return "".join(["<html><body>", *(f"<p>{p}</p>" for p in paragraphs), "</body></html>"]).encode()


def read_documents(folder: Path) -> list[Document]:
    """Return the documents below a folder as training would read them; assert that none is quarantined."""
    items, tally = read_source(folder)
    assert not tally.bad
    return [item for item in items if isinstance(item, Document)]
