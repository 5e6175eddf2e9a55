"""The families of models: decoders, encoders of images and texts, and vision models.

All other code reaches a family through its entry in `MODEL_FAMILIES`, whose strings name objects of the family's
modules, so that importing this table imports none of them.

encoder/   encoders of images and texts
vision/    vision models
images/    code that both share

The decoder is the family of the packages outside.
"""

from pkgutil import resolve_name
from typing import Any, Literal, NamedTuple

ModelKind = Literal["decoder", "encoder", "vision"]


class ModelFamily(NamedTuple):
    """Entry of a family: its properties, and the names of the objects that implement it, as "module:object"."""

    title: str
    """Name of a model of the family with its article, for messages."""
    predicts_next_token: bool
    """Whether models predict each next token, so that they have a perplexity, generate text and can be exported."""
    has_tokenizer: bool
    """Whether models read texts, so that runs have a tokenizer."""
    answers: str
    """Plural noun for the answers of a served model, such as "texts"."""
    model: str
    """`model.trunk.Trunk` subclass of the family's models."""
    router: str
    """`model.moe.BuildRouter`: function that builds the router of one layer."""
    plan: str
    """`planner.family.FamilyPlan` subclass."""
    data: str
    """`data.family.FamilyData` subclass."""
    objective: str
    """`train.objectives.Objective` subclass."""
    serving: str
    """`serving.family.FamilyServing` subclass."""
    evaluation: str
    """`evaluate.answer.Evaluate`: function that evaluates a model."""

    def part(self, name: str) -> Any:
        """Return the object that a field names; a package has a typed function for the field that it uses."""
        return resolve_name(getattr(self, name))


MODEL_FAMILIES: dict[ModelKind, ModelFamily] = {
    "decoder": ModelFamily(
        title="a decoder",
        predicts_next_token=True,
        has_tokenizer=True,
        answers="texts",
        model="mhmoe_ray.model.decoder:Decoder",
        router="mhmoe_ray.model.moe:build_plain_router",
        plan="mhmoe_ray.planner.family:DecoderPlan",
        data="mhmoe_ray.data.family:DecoderData",
        objective="mhmoe_ray.train.objectives.next_token:NextToken",
        serving="mhmoe_ray.serving.decoder:DecoderServing",
        evaluation="mhmoe_ray.evaluate.decoder_figures:decoder_figures",
    ),
    "encoder": ModelFamily(
        title="an encoder",
        predicts_next_token=False,
        has_tokenizer=True,
        answers="vectors and captions",
        model="mhmoe_ray.families.encoder.model.encoder:Encoder",
        router="mhmoe_ray.families.encoder.router:build_router",
        plan="mhmoe_ray.families.encoder.plan:EncoderPlan",
        data="mhmoe_ray.families.encoder.data.rows:EncoderRows",
        objective="mhmoe_ray.families.encoder.objective:Masked",
        serving="mhmoe_ray.families.encoder.serving.deployment:EncoderServing",
        evaluation="mhmoe_ray.families.encoder.evaluate.figures:encoder_figures",
    ),
    "vision": ModelFamily(
        title="a vision model",
        predicts_next_token=False,
        has_tokenizer=False,
        answers="classes and objects",
        model="mhmoe_ray.families.vision.model.vision:Vision",
        router="mhmoe_ray.families.vision.router:build_router",
        plan="mhmoe_ray.families.vision.plan:VisionPlan",
        data="mhmoe_ray.families.vision.data.rows:VisionRows",
        objective="mhmoe_ray.families.vision.objective:Tasks",
        serving="mhmoe_ray.families.vision.serving.deployment:VisionServing",
        evaluation="mhmoe_ray.families.vision.evaluate.figures:vision_figures",
    ),
}
