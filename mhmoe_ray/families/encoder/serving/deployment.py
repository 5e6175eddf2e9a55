"""Serving of encoders: vectors, rankings and captions."""

from typing import TYPE_CHECKING

from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.checkpoint.tokenizer import load_run_tokenizer
from mhmoe_ray.data.tokenizer import boundaries
from mhmoe_ray.errors import ServeError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serving.answer import ModelDetails, load_chat_template
from mhmoe_ray.serving.family import (
    FamilyServing,
    RequestExample,
    curl_command,
    require_packages,
    require_torch_engine,
)
from mhmoe_ray.spec import ModelSpec, ServeSpec
from mhmoe_ray.storage import Location

if TYPE_CHECKING:
    from fastapi import APIRouter

    from mhmoe_ray.families.encoder.serving.answer import EncoderAnswerer
    from mhmoe_ray.serving.api.access import AccessControl
    from mhmoe_ray.serving.api.service import TextService


class EncoderServing(FamilyServing):
    """Serving of encoders, which were trained to match images with texts or to write captions."""

    reads_images = True
    page_package = __package__

    def check(self, manifest: CheckpointManifest, spec: ServeSpec, run: RunDir) -> None:
        assert manifest.model.encoder is not None
        require_torch_engine(spec, manifest.model.family.title)
        if manifest.model.encoder.d_match is None and not _writes_captions(run):
            reason = "it was trained neither to match images with texts nor to write captions"
            fix = "fine-tune it with a part of objective contrastive or caption (`start.from`)"
            raise ServeError("the model", reason, fix)
        require_packages({"PIL": "pillow"}, "pictures")

    def check_files(self, checkpoint: Location, manifest: CheckpointManifest) -> None:
        load_chat_template(RunDir.of_checkpoint(checkpoint), load_run_tokenizer(checkpoint, manifest))

    def load(self, checkpoint: Location, spec: ServeSpec, manifest: CheckpointManifest) -> "EncoderAnswerer":
        from mhmoe_ray.checkpoint.load import load_for_inference
        from mhmoe_ray.families.encoder.model import Encoder
        from mhmoe_ray.families.encoder.serving.answer import EncoderAnswerer
        from mhmoe_ray.families.encoder.serving.engine import EncoderEngine
        from mhmoe_ray.families.encoder.serving.names import held_out_names

        run, encoder = RunDir.of_checkpoint(checkpoint), manifest.model.encoder
        assert encoder is not None
        tokenizer = load_run_tokenizer(checkpoint, manifest)
        model = load_for_inference(Encoder(manifest.model), checkpoint)
        if spec.gpus_per_replica:
            model.to("cuda")
        details = ModelDetails.from_spec(f"{run.id}/{checkpoint.name}", manifest.model, manifest.weights_sha256)
        names = held_out_names(run, manifest, tokenizer)
        engine = EncoderEngine(model, manifest.seq_len, boundaries(tokenizer).start, spec)
        return EncoderAnswerer(engine, tokenizer, details, encoder, writes_captions=_writes_captions(run), names=names)

    def routers(
        self, served: "EncoderAnswerer", model: str, spec: ServeSpec, access: "AccessControl"
    ) -> "tuple[TextService[EncoderAnswerer], list[APIRouter]]":
        from mhmoe_ray.families.encoder.serving.routes import encoder_routers
        from mhmoe_ray.serving.api.service import TextService

        service = TextService(served, model, spec, access)
        return service, encoder_routers(service)

    def request_example(self, model: ModelSpec, run: RunDir, url: str) -> RequestExample:
        assert model.encoder is not None
        if model.encoder.d_match is not None:
            command = curl_command(url, "v1/embeddings", {"input": "green apple"})
            return RequestExample("v1/embeddings", command)
        return RequestExample("v1/chat/completions", caption_command(url))


def _writes_captions(run: RunDir) -> bool:
    return any(part.traits.writes for part in run.spec().parts)


def caption_command(url: str) -> str:
    """Return a shell command that asks the server of an encoder at `url` for the caption of an image."""
    image = '{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,%s"}}'
    body = f'{{"messages": [{{"role": "user", "content": [{image}]}}]}}'
    # The image is given to the shell's own printf, because an argument of a program may have only 128 KiB.
    encoded_body = f"printf '{body}' \"$(base64 < image.jpg | tr -d '\\n')\""
    return f"{encoded_body} | curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d @-"
