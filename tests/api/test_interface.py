"""Tests of what `import mhmoe_ray` offers: names and their documentation."""

import inspect
import pydoc
from pathlib import Path

import pytest

import mhmoe_ray as mh

README = (Path(__file__).parents[2] / "mhmoe_ray/api/README.md").read_text()


@pytest.mark.parametrize("name", mh.__all__)
def test_every_name_is_documented(name):
    """A function's docstring has sections for arguments and errors; any other has a sentence as its first line."""
    value = getattr(mh, name)
    assert name in dir(mh)
    assert f"`mh.{name}" in README or f"mh.{name}(" in README
    docstring = inspect.getdoc(value)
    if inspect.isfunction(value):
        assert inspect.signature(value).parameters
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


def test_help_shows_the_arguments_of_a_function():
    """A module with the name of a function would replace the function when imported, so there is no such module."""
    modules = {path.stem for path in Path(mh.__file__).parent.iterdir()}
    for name in ("serve", "submit", "load", "plan", "find_run"):
        assert inspect.isfunction(getattr(mh, name))
        assert f"function {name} in module mhmoe_ray.api." in pydoc.render_doc(getattr(mh, name))
        assert name not in modules
