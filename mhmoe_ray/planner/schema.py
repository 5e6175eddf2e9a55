"""JSON schemas of the spec and sweep files that users write, for editors and for tools that write such files."""

from typing import Any

from mhmoe_ray.planner.resolve import Shorthands
from mhmoe_ray.spec import RunSpec, SweepSpec

_PRESET_SECTIONS = ("ModelSpec", "MoESpec", "TrainSpec", "DataSpec")
"""Classes of the sections that a preset fills, so that a file may leave out keys that these classes require."""


def spec_schema() -> dict[str, Any]:
    """Return the JSON schema of a run's spec file, which may have shorthands and leave out keys that a preset fills."""
    schema, shorthands = RunSpec.model_json_schema(), Shorthands.model_json_schema()
    definitions = schema["$defs"] | shorthands.get("$defs", {})
    for name in _PRESET_SECTIONS:
        definitions[name].pop("required", None)
    # A preset sets only the sequence length of the section `data`, so these keys stay required.
    definitions["DataSpec"]["required"] = ["sources", "prepared"]
    # A file may give a single number of workers, which means a range with equal ends.
    workers = definitions["WorkerRange"]
    definitions["WorkerRange"] = {"anyOf": [{"type": "integer", "minimum": 1}, workers], "title": "WorkerRange"}
    properties = schema["properties"] | shorthands["properties"]
    # The validator of `storage` is a plain function, for which pydantic writes no type, so the type is stated here.
    properties["storage"] = {"type": "string", "default": "runs", "description": properties["storage"]["description"]}
    # In a file, a reference may also be the name of a preset.
    properties["reference"]["anyOf"].insert(0, {"type": "string"})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "$defs": definitions,
        "title": "A run of mhmoe-ray",
        "properties": properties,
        "required": ["name", "data"],
        "anyOf": [{"required": [*keys]} for keys in (("model", "train"), ("start", "train"), ("preset",))],
    }


def sweep_schema() -> dict[str, Any]:
    """Return the JSON schema of a sweep file."""
    schema = SweepSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "A sweep of mhmoe-ray"}
