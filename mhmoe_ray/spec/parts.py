"""Parts of a micro-batch: their sources, objectives and losses, and checks that they fit the model of a run.

The checks raise ValueError with the key to change.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

from mhmoe_ray.spec.encoder import EncoderSpec
from mhmoe_ray.spec.formats import Column
from mhmoe_ray.spec.vision import VisionSpec

if TYPE_CHECKING:
    from mhmoe_ray.spec.run import RunSpec

LossKind = Literal["image", "text", "match", "caption", "answer", "compare"]
"""Loss of an encoder on hidden patches, hidden tokens, matches of images with texts, captions, answers to questions, or
the truth of sentences about two images."""


class ObjectiveTraits(NamedTuple):
    """Properties of a training objective, for its samples, its checks and the estimates of `mhmoe plan`."""

    model: Literal["decoder", "encoder", "vision"]
    hides: bool = False
    """True if patches and tokens are hidden in the input, and predicted at their positions."""
    writes: bool = False
    """True if each token and the end of a text are predicted from the image and the earlier tokens."""
    compares: bool = False
    """True if images are compared with all texts of the part in a micro-batch, and encoded apart."""
    loss: LossKind | None = None
    """Kind of the single loss; None if each column has a loss."""
    columns: tuple[Column, ...] | None = None
    """Columns that the sources must have; None if images, texts and pairs fit."""
    format: str | None = None
    """Format of sources with these columns."""
    head: str | None = None
    """Key of `model.encoder` that gives the model the head of the objective."""
    implementation: str | None = None
    """Module and name of the `train.objectives.Objective` subclass, if it is not that of the model's family."""
    figures: tuple[str, ...] = ()
    """Names of figures besides the loss, which are means over samples."""

    @property
    def needs_pairs(self) -> bool:
        """True if every sample must have an image and a text."""
        return self.writes or self.compares


OBJECTIVES: dict[str, ObjectiveTraits] = {
    "next_token": ObjectiveTraits("decoder"),
    "dpo": ObjectiveTraits(
        "decoder",
        implementation="mhmoe_ray.train.objectives.dpo:DirectPreference",
        figures=("chosen", "rejected", "margins", "accuracies"),
    ),
    "masked": ObjectiveTraits("encoder", hides=True),
    "contrastive": ObjectiveTraits("encoder", compares=True, loss="match", head="d_match"),
    "caption": ObjectiveTraits("encoder", writes=True, loss="caption"),
    "answer": ObjectiveTraits(
        "encoder", loss="answer", columns=("class", "image", "text"), format="vqa", head="answers"
    ),
    "compare": ObjectiveTraits(
        "encoder",
        loss="compare",
        columns=("class", "image", "second_image", "text"),
        format="nlvr2",
        head="compares",
    ),
    "classify": ObjectiveTraits("vision"),
    "detect": ObjectiveTraits("vision"),
}
"""All objectives by their name in a spec (`data.parts.NAME.objective`)."""
if TYPE_CHECKING:
    Objective = str
else:
    Objective = Literal[tuple(OBJECTIVES)]

DETECTION_LOSSES = ("objectness", "proposals", "classes", "boxes", "masks")
"""Losses of a detector: objects in anchors, edges of proposals, and classes, edges and masks of boxes."""


class MicroBatchPart(NamedTuple):
    """Part of every micro-batch: samples of some sources, which are trained with one objective."""

    name: str
    """Empty for the only part of a spec without parts."""
    sources: tuple[str, ...]
    samples: int
    objective: Objective
    columns: tuple[Column, ...]
    """Columns of the samples, sorted by name."""
    weight: float
    has_masks: bool = False
    """True if the part trains a detector that also predicts masks."""

    @property
    def traits(self) -> ObjectiveTraits:
        return OBJECTIVES[self.objective]

    @property
    def is_joint(self) -> bool:
        """True if each sample is a pair of an image and a text, with attention over both together."""
        return len(self.columns) > 1 and not self.traits.compares

    @property
    def pairs_per_sample(self) -> int:
        """Number of images of a sample that has any, each of which is encoded with the sample's text."""
        return 2 if "second_image" in self.columns else 1

    @property
    def pairs(self) -> int:
        """Number of images or texts that are encoded for all samples of the part."""
        return self.samples * self.pairs_per_sample

    @property
    def masking_keys(self) -> tuple[str, ...]:
        """Keys of `train.masking` that set how much the part hides."""
        if not self.traits.hides:
            return ()
        return self.columns if len(self.columns) == 1 else tuple(f"pair_{column}" for column in self.columns)

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the part's losses; a masked pair has one for the image and one for the text."""
        if self.traits.hides and len(self.columns) > 1:
            return tuple(f"{self.name}_{column}" for column in self.columns)
        if self.objective == "detect":
            return tuple(f"{self.name}_{kind}" for kind in DETECTION_LOSSES if kind != "masks" or self.has_masks)
        return (self.name,)

    @property
    def loss_kinds(self) -> tuple[LossKind, ...]:
        if self.traits.loss is not None:
            return (self.traits.loss,)
        return tuple(kind for kind in ("image", "text") if kind in self.columns)


def check_parts(spec: "RunSpec") -> None:
    """Check that the parts have objectives that fit the model, and together as many samples as a micro-batch."""
    sizes = [part.micro_batch_size for part in spec.data.parts.values()]
    if sizes and sum(sizes) != spec.train.micro_batch_size:
        raise ValueError(
            f"train.micro_batch_size is {spec.train.micro_batch_size}, but the parts of a micro-batch have "
            f"{' + '.join(map(str, sizes))} samples: set it to {sum(sizes)}"
        )
    for name, part in spec.data.parts.items():
        if spec.model.vision is not None:
            continue
        if part.objective == "dpo":
            raise ValueError(
                f"data.parts.{name}.objective dpo is for pairs, which make up all samples: remove data.parts"
            )
        model = OBJECTIVES[part.objective].model if part.objective is not None else None
        if model == "vision":
            raise ValueError(f"data.parts.{name}.objective {part.objective} is for vision models: set model.vision")
        if spec.model.encoder is None and model == "encoder":
            raise ValueError(f"data.parts.{name}.objective {part.objective} is for models with an encoder")
        if spec.model.encoder is None and part.weight != 1:
            raise ValueError(f"data.parts.{name}.weight is for models with an encoder, and would be ignored")
        if spec.model.encoder is not None and model == "decoder":
            raise ValueError(f"data.parts.{name}.objective is {part.objective}, but an encoder reads whole texts")


def check_pairs(spec: "RunSpec") -> None:
    """Check that a run on pairs of conversations has nothing else to learn, and has a model to be compared with."""
    source, other_sources = spec.data.pair_sources[0], spec.data.sources.keys() - spec.data.pair_sources
    if other_sources or spec.data.parts:
        key = f"data.sources.{min(other_sources)}" if other_sources else "data.parts"
        raise ValueError(f"data.sources.{source} has pairs, which must be the only samples: remove {key}")
    if spec.start is None:
        raise ValueError(
            f"data.sources.{source} has pairs, on which a model is compared with the one that it starts from: set "
            "start.from"
        )
    if spec.train.loss_chunk_rows is not None:
        raise ValueError(
            f"train.loss_chunk_rows adds up the losses of all tokens, but data.sources.{source} has pairs, whose "
            "answers have losses of their own: remove it"
        )


def check_encoder_parts(spec: "RunSpec", encoder: EncoderSpec) -> None:
    """Check that the parts of micro-batches provide what an encoder learns from, and fit the other options."""
    if not spec.data.parts:
        raise ValueError("an encoder needs data.parts: at least one with texts and one with images, or pairs")
    for part in spec.parts:
        for source in part.sources:
            columns = spec.data.sources[source].sample_columns
            if part.traits.columns not in (None, columns):
                needed_columns, format = ", ".join(part.traits.columns or ()), part.traits.format
                raise ValueError(
                    f"part {part.name} is {part.objective}, so its samples need {needed_columns}, but "
                    f"data.sources.{source} has {', '.join(columns)}: name a source of format {format}"
                )
            if part.traits.columns is None and "second_image" in columns:
                raise ValueError(
                    f"data.sources.{source} has two images in a sample, but part {part.name} is {part.objective}, "
                    "which reads one: set its objective to compare"
                )
            if part.traits.columns is None and not {"image", "text"}.issuperset(columns):
                raise ValueError(f"data.sources.{source} has {columns[0]} for vision models: set its columns")
            if columns != part.columns:
                raise ValueError(
                    f"part {part.name} has sources with {' and '.join(part.columns)}, but data.sources.{source} "
                    f"has {' and '.join(columns)}: set its columns, or put it into a part of its own"
                )
        if part.traits.needs_pairs and len(part.columns) < 2:
            raise ValueError(f"part {part.name} is {part.objective}, so its sources need an image and a text")
        if part.traits.writes and spec.model.moe is not None and spec.model.moe.router == "smear":
            raise ValueError(
                f"part {part.name} is {part.objective}, whose tokens must not see later ones, but router smear "
                "averages experts over all of them: choose another objective or router"
            )
        if part.traits.compares and part.samples < 2:
            raise ValueError(f"part {part.name} is {part.objective}, so its micro_batch_size must be at least 2")
    losses = [loss for part in spec.parts for loss in part.losses]
    if len(set(losses)) < len(losses):
        raise ValueError(f"two losses of the parts have the same name, among {', '.join(losses)}: rename a part")
    # An encoder must learn to read both images and texts, unless it starts from a model that has learned both already.
    if not {column for part in spec.parts for column in part.columns} >= {"image", "text"} and spec.start is None:
        raise ValueError(
            "an encoder needs parts with images and with texts, or with pairs, unless it starts from another run"
        )
    spec.train.masking.check_use({key for part in spec.parts for key in part.masking_keys}, encoder.patches)
    for objective, traits in OBJECTIVES.items():
        is_trained = any(part.objective == objective for part in spec.parts)
        if traits.head is not None and is_trained != bool(getattr(encoder, traits.head)):
            state = "missing" if is_trained else f"given, but no part of data.parts is {objective}"
            raise ValueError(f"model.encoder.{traits.head} is {state}: set both or none")
    if spec.data.seq_len > encoder.text_positions:
        raise ValueError(
            f"data.seq_len is {spec.data.seq_len}, but a text has {encoder.text_positions} positions: lower it, or "
            "raise model.encoder.text_positions"
        )
    if spec.data.seq_len < 2:
        raise ValueError("data.seq_len must be at least 2: a start token, and a token of the text")
    if spec.data.packing != "concat":
        raise ValueError("data.packing is for decoders: each text of an encoder is a sample of its own; remove it")
    if spec.data.chat_sources:
        raise ValueError(f"data.sources.{spec.data.chat_sources[0]} has conversations, which decoders alone read")
    if spec.train.loss_chunk_rows is not None:
        raise ValueError("train.loss_chunk_rows is for decoders: an encoder computes logits of hidden tokens alone")
    if spec.start is not None and spec.start.how != "copy":
        raise ValueError(f"start.how {spec.start.how} is for decoders: an encoder can only start from a copy")
    if spec.start is not None and spec.start.order == "continue":
        raise ValueError("start.order continue is for decoders: remove it")
    hides_images = any(part.traits.hides and "image" in part.columns for part in spec.parts)
    if spec.start is None and encoder.image_targets == "codebook" and not hides_images:
        raise ValueError(
            "model.encoder.image_targets is codebook, but no part with objective masked has images: remove it"
        )
    if spec.start is not None and encoder.image_targets == "codebook" and hides_images:
        raise ValueError(
            "a codebook is made of a run's own images, so patches would mean other entries than at its start: use "
            "parts with objectives contrastive and caption, or texts"
        )


def check_vision_parts(spec: "RunSpec", vision: VisionSpec) -> None:
    """Check that each task of a vision model has a part of the same name with samples that it can learn from."""
    if vision.tasks.keys() != spec.data.parts.keys():
        names, parts = ", ".join(vision.tasks), ", ".join(spec.data.parts) or "none"
        raise ValueError(f"model.vision.tasks are {names}, but data.parts are {parts}: give each task a part")
    for name, task in vision.tasks.items():
        part, column = spec.data.parts[name], "class" if task.detector is None else "objects"
        if part.objective not in (None, task.objective):
            raise ValueError(
                f"data.parts.{name}.objective is {part.objective}, but its task is {task.objective}: remove it"
            )
        for source in part.sources:
            columns = spec.data.sources[source].sample_columns
            if set(columns) != {"image", column}:
                raise ValueError(
                    f"task {name} needs sources with image and {column}, but data.sources.{source} has "
                    f"{' and '.join(columns)}: set its columns"
                )
    text_keys = ("seq_len", "packing", "tokenizer", "tokenizer_pattern", "tokenizer_model", "tokenizer_train_mb")
    if key := spec.data.changed_key(*text_keys):
        raise ValueError(f"data.{key} is for texts, and would be ignored by a vision model: remove it")
    if spec.cluster.strategy == "zero3" and any(task.detector is not None for task in vision.tasks.values()):
        raise ValueError(
            "cluster.strategy zero3 gathers weights when a module runs, but a detector does not run on a worker "
            "without images: set it to fsdp or zero2"
        )
    if spec.train.loss_chunk_rows is not None:
        raise ValueError("train.loss_chunk_rows is for decoders: remove it")
    if spec.start is not None:
        raise ValueError("start is for decoders and encoders: remove it")
