"""`mhmoe doctor`: what works here and what does not."""

from typing import TYPE_CHECKING

import typer
from rich.text import Text

from mhmoe_ray.cli.common import AddressOption, JsonOption, StorageOption, out, print_json
from mhmoe_ray.cli.complete import STORAGE

if TYPE_CHECKING:
    from mhmoe_ray.cluster.doctor import Finding


STYLES = {"ok": "green", "note": "dim", "warning": "yellow", "error": "bold red"}


def doctor(address: AddressOption = None, storage: StorageOption = STORAGE, json: JsonOption = False) -> None:
    """Look at this machine, the cluster that commands would speak to, and storage, and say what to do.

    The exit code is 11 if something is an error; notes and warnings are none.
    """
    from mhmoe_ray.cluster.doctor import examine
    from mhmoe_ray.errors import DOCTOR_EXIT_CODE

    found = []
    for finding in examine(address, storage):
        found.append(finding)
        if not json:
            _show(finding)
    if json:
        print_json([f._asdict() for f in found])
    if any(f.level == "error" for f in found):
        raise typer.Exit(DOCTOR_EXIT_CODE)


def _show(finding: "Finding") -> None:
    level = Text(f"{finding.level:<8}", style=STYLES[finding.level])
    out.print(level, Text(f"{finding.what}: {finding.found}"), soft_wrap=True)
    if finding.level in ("warning", "error"):
        out.print(Text(f"{'':<9}{finding.fix}", style="dim"), soft_wrap=True)
