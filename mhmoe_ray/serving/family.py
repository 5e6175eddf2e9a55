"""The interface of the serving of a family of models: checks before replicas start, the loaded model, its routes."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.errors import ServeError
from mhmoe_ray.families import MODEL_FAMILIES, ModelKind
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import ModelSpec, ServeSpec
from mhmoe_ray.storage import Location

if TYPE_CHECKING:
    from fastapi import APIRouter

    from mhmoe_ray.serving.answer import ServedModel
    from mhmoe_ray.serving.api.access import AccessControl
    from mhmoe_ray.serving.api.service import ModelService


class RequestExample(NamedTuple):
    """Request that a user may try first."""

    route: str
    command: str
    page: str = ""
    """Path of the model's web page."""


class FamilyServing(ABC):
    """Serving of one family's models."""

    reads_images = False
    """Whether requests have images, so that their bodies may be larger."""
    page_package: ClassVar[str]
    """Package with the web page, page.html."""

    @abstractmethod
    def check(self, manifest: CheckpointManifest, spec: ServeSpec, run: RunDir) -> None:
        """Check that a model can be served here, without starting its engine.

        Raises:
            ServeError: the engine or a package is not installed, or the engine cannot compute this model.
        """

    @abstractmethod
    def check_files(self, checkpoint: Location, manifest: CheckpointManifest) -> None:
        """Check the files of the run that the model needs.

        Raises:
            CheckpointError, DataError, ServeError: a file is missing, damaged or invalid.
        """

    @abstractmethod
    def load(self, checkpoint: Location, spec: ServeSpec, manifest: CheckpointManifest) -> "ServedModel":
        """Start the engine for a checkpoint, whose manifest was verified and checked, and return the served model.

        Raises:
            CheckpointError, DataError, ServeError: as from `check_files`.
        """

    @abstractmethod
    def routers(
        self, served: Any, model: str, spec: ServeSpec, access: "AccessControl"
    ) -> "tuple[ModelService[Any], list[APIRouter]]":
        """Return the service of a served model, and the routers with the routes that only this family has."""

    @abstractmethod
    def request_example(self, model: ModelSpec, run: RunDir, url: str) -> RequestExample:
        """Return a first request to a model of a run that is served at this URL."""


def curl_command(url: str, route: str, body: Mapping[str, Any]) -> str:
    """Return a shell command that sends a request to the server at `url`."""
    return f"curl {url}/{route} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


def serving_of(kind: ModelKind) -> FamilyServing:
    """Return the serving of a family."""
    serving: type[FamilyServing] = MODEL_FAMILIES[kind].part("serving")
    return serving()


def require_packages(packages: Mapping[str, str], extra: str) -> None:
    """Raise ServeError, which names the extra to install, if a package (by module name) is missing."""
    for module, package in packages.items():
        if find_spec(module) is None:
            reason = f"it needs the package {package}, which is missing"
            raise ServeError("the model", reason, f"pip install 'mhmoe-ray[{extra}]' where replicas run")


def require_torch_engine(spec: ServeSpec, title: str) -> None:
    """Raise ServeError if the spec names another engine than torch for another model than a decoder."""
    if spec.engine != "torch":
        reason = f"it computes decoders, and this is {title}"
        raise ServeError(f"engine {spec.engine}", reason, "set serve.engine=torch")
