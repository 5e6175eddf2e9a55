"""Serving of decoders: completions and chat."""

from typing import TYPE_CHECKING

from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.checkpoint.tokenizer import load_run_tokenizer
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serving.answer import Answerer, load_chat_template
from mhmoe_ray.serving.family import FamilyServing, RequestExample, curl_command
from mhmoe_ray.serving.load import check_engine, load_answerer
from mhmoe_ray.spec import ModelSpec, ServeSpec
from mhmoe_ray.storage import Location

if TYPE_CHECKING:
    from fastapi import APIRouter

    from mhmoe_ray.serving.api.access import AccessControl
    from mhmoe_ray.serving.api.service import CompletionService


class DecoderServing(FamilyServing):
    """Serving of decoders."""

    page_package = "mhmoe_ray.serving.api"

    def check(self, manifest: CheckpointManifest, spec: ServeSpec, run: RunDir) -> None:
        check_engine(manifest, spec)

    def check_files(self, checkpoint: Location, manifest: CheckpointManifest) -> None:
        load_chat_template(RunDir.of_checkpoint(checkpoint), load_run_tokenizer(checkpoint, manifest))

    def load(self, checkpoint: Location, spec: ServeSpec, manifest: CheckpointManifest) -> Answerer:
        return load_answerer(checkpoint, spec, manifest)

    def routers(
        self, served: Answerer, model: str, spec: ServeSpec, access: "AccessControl"
    ) -> "tuple[CompletionService, list[APIRouter]]":
        from mhmoe_ray.serving.api.completions import chat_router, completions_router
        from mhmoe_ray.serving.api.service import CompletionService

        service = CompletionService(served, model, spec, access)
        return service, [completions_router(service), chat_router(service)]

    def request_example(self, model: ModelSpec, run: RunDir, url: str) -> RequestExample:
        # The bodies have no `max_tokens`, so that the server chooses a number of tokens that its limit allows.
        if run.chat_template_file.exists():
            body = {"messages": [{"role": "user", "content": "Who are you?"}]}
            return RequestExample("v1/chat/completions", curl_command(url, "v1/chat/completions", body), "chat")
        return RequestExample("v1/completions", curl_command(url, "v1/completions", {"prompt": "Fellow citizens"}))
