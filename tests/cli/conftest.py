from pathlib import Path

import pytest

from mhmoe_ray.spec import dump_spec
from tests.data.texts import write_corpus
from tests.support.specs import tiny_spec


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Return a project folder with raw text in raw/ and the spec of a tiny model in spec.yaml; all tests share it."""
    folder = tmp_path_factory.mktemp("project")
    write_corpus(folder / "raw")
    write_spec(folder)
    return folder


def write_spec(folder: Path, **sections) -> Path:
    """Write the spec of a tiny model to `folder`/spec.yaml, and return the path of that file.

    Args:
        folder: The project folder; the spec's paths are below it.
        sections: Keys to replace, as a mapping for each section, for example `train={"steps": 5}`.
    """
    defaults = {
        "cluster": {"workers": 2, "ep": 2},
        "data": {"validation_fraction": 0.2},
        "train": {"steps": 30, "validate_every": 10, "checkpoint_every": 10},
    }
    merged = {k: {**defaults.get(k, {}), **sections.get(k, {})} for k in {*defaults, *sections}}
    path = folder / "spec.yaml"
    path.write_text(dump_spec(tiny_spec(folder, **merged)))
    return path
