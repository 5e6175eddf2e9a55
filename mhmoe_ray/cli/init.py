"""`mhmoe init`: write a spec for the text in a folder."""

from pathlib import Path
from typing import Annotated

import typer

from mhmoe_ray.cli.output import print_line, print_note, show_activity


def init(
    folder: Annotated[Path, typer.Argument(help="Folder with text, or a file.")] = Path(),
    output: Annotated[Path, typer.Option(help="File of the spec to write.")] = Path("spec.yaml"),
) -> None:
    """Write a spec that trains a small model on the text in a folder, in minutes on this machine's CPU.

    Files of text, JSON lines and Parquet are found in the folder and its subfolders. For example `mhmoe init books`.
    """
    show_activity("looking at the text")
    from mhmoe_ray.api.text_folder import make_text_spec
    from mhmoe_ray.errors import SpecError
    from mhmoe_ray.storage import create_file, report_write_errors

    if output.exists():
        raise SpecError(f"spec {output}", "it exists already", "remove it, or name another one: --output FILE")
    spec = make_text_spec(folder)
    with report_write_errors(output), create_file(output) as stream:
        stream.write(spec.text.encode())
    for path, reason in spec.omissions.items():
        print_note(f"left out {path}: {reason}")
    print_line(f"wrote {output}; next:\n  mhmoe submit {output}\n  mhmoe serve deploy")
