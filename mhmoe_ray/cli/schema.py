"""`mhmoe schema`: the JSON schema of a spec or a sweep, for editors that complete and check such files."""

from typing import Annotated, Literal

import typer

from mhmoe_ray.cli.output import print_json

SchemaKind = Literal["spec", "sweep"]


def schema(
    kind: Annotated[SchemaKind, typer.Argument(help="Kind of file that the schema describes.")] = "spec",
) -> None:
    """Print the JSON schema of a spec, or of a sweep.

    Editors with a YAML language server complete and check a file whose first line names the schema, as the specs in
    jobs/ do: # yaml-language-server: $schema=spec.schema.json
    """
    from mhmoe_ray.planner.schema import spec_schema, sweep_schema

    print_json(spec_schema() if kind == "spec" else sweep_schema())
