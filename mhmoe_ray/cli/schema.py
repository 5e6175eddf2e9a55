"""`mhmoe schema`: the JSON schema of a spec or a sweep, with which editors complete and check it."""

from typing import Annotated, Literal

import typer

from mhmoe_ray.cli.common import print_json

Kind = Literal["spec", "sweep"]


def schema(kind: Annotated[Kind, typer.Argument(help="Of which file.")] = "spec") -> None:
    """Print the JSON schema of a spec, or of a sweep.

    Editors with a YAML language server complete and check a file whose first line names the schema, as the specs in
    jobs/ do: # yaml-language-server: $schema=spec.schema.json
    """
    from mhmoe_ray.planner.schema import spec_schema, sweep_schema

    print_json(spec_schema() if kind == "spec" else sweep_schema())
