"""Packages that tests make: a .deb is an ar archive of three members, a wheel is a zip archive."""

import io
import re
import tarfile
import zipfile
from pathlib import Path

from mhmoe_ray.corpus.packages import Package
from mhmoe_ray.corpus.readers import pages
from mhmoe_ray.corpus.small import Record
from tests.data.sources.read import read

PAGES = pages("//body")


def made(origin: str, name: str, files: str, reader=PAGES, domain: str = "c4") -> Package:
    return Package(origin, name, "MIT", re.compile(files), reader, domain)


def tar(files: dict[str, bytes], kind: str = "xz", links: dict[str, str] | None = None) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=f"w:{kind}") as out:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(f"./{name}")
            member.type, member.linkname = tarfile.SYMTYPE, target
            out.addfile(member)
    return packed.getvalue()


def write_deb(path: Path, files: dict[str, bytes], kind: str = "xz", links: dict[str, str] | None = None) -> Path:
    control = b"Package: p\nVersion: 1\nArchitecture: all\nMaintainer: A <a@example.org>\nDescription: d\n"
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": tar({"control": control, "postinst": b"#!/bin/sh\nexit 1\n"}, "gz"),
        f"data.tar.{kind}": tar(files, kind, links),
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


def page(*paragraphs: str) -> bytes:
    return "".join(["<html><body>", *(f"<p>{p}</p>" for p in paragraphs), "</body></html>"]).encode()


def records_of(folder: Path) -> list[Record]:
    """Return the records that our own readers read below the folder, none of which may be quarantined."""
    items, tally = read(folder)
    assert not tally.bad
    return items
