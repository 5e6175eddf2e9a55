"""Tests of what `import mhmoe_ray` offers: names, their documentation, and the function with the name of a package."""

import importlib
import inspect
from pathlib import Path

import pytest
from ray import cloudpickle

import mhmoe_ray as mh
from mhmoe_ray.api.service import serve

README = (Path(__file__).parents[2] / "mhmoe_ray/api/README.md").read_text()


@pytest.mark.parametrize("name", mh.__all__)
def test_every_name_is_documented(name):
    """A function has a section for its arguments, and a docstring begins with a sentence of its own."""
    value = getattr(mh, name)
    assert name in dir(mh)
    assert f"`mh.{name}" in README or f"mh.{name}(" in README
    function = serve if name == "serve" else value
    docstring = inspect.getdoc(function)
    if inspect.isfunction(function):
        assert inspect.signature(function).parameters
        assert "Args:" in docstring
        assert "Raises:" in docstring
    else:
        assert docstring.splitlines()[0].endswith((".", ":"))


@pytest.mark.parametrize("class_name", ["Run", "LoadedModel", "Service"])
def test_every_public_method_is_documented(class_name):
    for name, member in inspect.getmembers(getattr(mh, class_name)):
        if name.startswith("_"):
            continue
        assert inspect.getdoc(member), name
        function = member.fget if isinstance(member, property) else member
        parameters = set(inspect.signature(function).parameters) - {"self", "on_note"} if callable(function) else set()
        documented = inspect.getdoc(member)
        missing_parameters = [parameter for parameter in parameters if f"    {parameter}: " not in documented]
        assert missing_parameters == [] or "see `generate`" in documented, (name, missing_parameters)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'sbumit'"):
        _ = mh.sbumit


def test_serve_is_a_function_and_a_package(tmp_path):
    importlib.import_module("mhmoe_ray.serve.load")
    assert mh.serve is importlib.import_module("mhmoe_ray.serve")
    assert cloudpickle.loads(cloudpickle.dumps(mh.serve)) is mh.serve
    for function in (mh.serve, serve):
        with pytest.raises(mh.MhmoeError, match="there is no such run"):
            function("nothing", storage=tmp_path)
