"""Serving of vision models: classes, objects and masks."""

from typing import TYPE_CHECKING

from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.checkpoint.run_files import load_run_classes
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serving.answer import ModelDetails
from mhmoe_ray.serving.family import FamilyServing, RequestExample, require_packages, require_torch_engine
from mhmoe_ray.spec import ModelSpec, ServeSpec
from mhmoe_ray.storage import Location

if TYPE_CHECKING:
    from fastapi import APIRouter

    from mhmoe_ray.families.vision.serving.answer import VisionAnswerer
    from mhmoe_ray.serving.api.access import AccessControl
    from mhmoe_ray.serving.api.service import ModelService


class VisionServing(FamilyServing):
    """Serving of vision models."""

    reads_images = True
    page_package = __package__

    def check(self, manifest: CheckpointManifest, spec: ServeSpec, run: RunDir) -> None:
        assert manifest.model.vision is not None
        require_torch_engine(spec, manifest.model.family.title)
        has_detector = any(task.detector is not None for task in manifest.model.vision.tasks.values())
        require_packages({"PIL": "pillow"} | ({"torchvision": "torchvision"} if has_detector else {}), "vision")

    def check_files(self, checkpoint: Location, manifest: CheckpointManifest) -> None:
        load_run_classes(checkpoint, manifest)

    def load(self, checkpoint: Location, spec: ServeSpec, manifest: CheckpointManifest) -> "VisionAnswerer":
        from mhmoe_ray.families.vision.checkpoint import load_verified_vision
        from mhmoe_ray.families.vision.serving.answer import VisionAnswerer
        from mhmoe_ray.families.vision.serving.engine import VisionEngine

        run, vision = RunDir.of_checkpoint(checkpoint), manifest.model.vision
        assert vision is not None
        class_names = load_run_classes(checkpoint, manifest)
        model = load_verified_vision(checkpoint, manifest)
        if spec.gpus_per_replica:
            model.to("cuda")
        details = ModelDetails.from_spec(f"{run.id}/{checkpoint.name}", manifest.model, manifest.weights_sha256)
        return VisionAnswerer(VisionEngine(model, spec), details, vision, class_names)

    def routers(
        self, served: "VisionAnswerer", model: str, spec: ServeSpec, access: "AccessControl"
    ) -> "tuple[ModelService[VisionAnswerer], list[APIRouter]]":
        from mhmoe_ray.families.vision.serving.routes import vision_router
        from mhmoe_ray.serving.api.service import ModelService

        service = ModelService(served, model, spec, access)
        return service, [vision_router(service)]

    def request_example(self, model: ModelSpec, run: RunDir, url: str) -> RequestExample:
        assert model.vision is not None
        is_classifier = next(iter(model.vision.tasks.values())).detector is None
        route = "image-classification" if is_classifier else "object-detection"
        return RequestExample(route, image_command(f"{url}/{route}"))


def image_command(url: str) -> str:
    """Return a shell command that sends an image to `url`, an endpoint of the server of a vision model."""
    return f"curl {url} -H 'Content-Type: image/jpeg' --data-binary @image.jpg"
