"""Plans of encoders: sizes of patches, positions, outputs for hidden patches and tokens, and the matching head."""

from mhmoe_ray.architectures import FLOAT32
from mhmoe_ray.planner.family import HEADS, MATCH, OUTPUT, PATCHES, FamilyPlan, ModelPart, all_active
from mhmoe_ray.spec import EncoderSpec, ModelSpec, RunSpec


class EncoderPlan(FamilyPlan):
    """Plan of encoders, whose blocks have weights for images and weights for texts."""

    branches = 2
    is_causal = False

    def embedding_rows(self, model: ModelSpec) -> int:
        # Besides tokens and positions, an image as a whole and hidden patches have a vector each.
        encoder = _encoder(model)
        return model.vocab_size + encoder.text_positions + (encoder.image_positions or encoder.image_tokens) + 2

    def input_parts(self, model: ModelSpec) -> list[ModelPart]:
        projection = _encoder(model).patch_values * model.d_model
        return [ModelPart(PATCHES, 1, *all_active(projection + model.d_model), projection)]

    def output_parts(self, model: ModelSpec) -> list[ModelPart]:
        # Outputs are computed for hidden patches and tokens alone, so their multiply-adds per token are left out.
        encoder = _encoder(model)
        outputs = (model.d_model + 1) * (encoder.target_values + model.vocab_size)
        parts = [ModelPart(OUTPUT, 1, *all_active(outputs), 0)]
        if encoder.d_match is not None:
            parts.append(ModelPart(MATCH, 1, *all_active(2 * model.d_model * encoder.d_match + 1), 0))
        d, answers = model.d_model, encoder.answers
        if answers is not None:
            norms, linear = 2 * d + 4 * d, (d + 1) * d + (d + 1) * 2 * d + (2 * d + 1) * answers
            parts.append(ModelPart(HEADS, 1, *all_active(norms + linear), 0))
        if encoder.compares:
            norms, linear = 8 * d + 4 * d, (4 * d + 1) * 2 * d + (2 * d + 1) * 2
            parts.append(ModelPart(HEADS, 1, *all_active(norms + linear), 0))
        return parts

    def routers(self, model: ModelSpec) -> int:
        return 2 if _encoder(model).routers == "per_modality" else 1

    def output_bytes(self, spec: RunSpec, size: int) -> int:
        return FLOAT32 * hidden_output_values(spec)

    def loss_bytes(self, spec: RunSpec) -> int:
        return 2 * FLOAT32 * hidden_output_values(spec)

    def summary(self, spec: RunSpec) -> dict[str, str]:
        encoder = _encoder(spec.model)
        targets = "pixels" if encoder.image_targets == "pixels" else f"a codebook of {encoder.codebook_size:,} entries"
        text = (
            f"images of {encoder.image_size} x {encoder.image_size} pixels in {encoder.patches} patches, which are "
            f"predicted as {targets}; texts of up to {spec.data.seq_len - 1} tokens"
        )
        if encoder.answers is not None:
            text += f"; answers to questions among {encoder.answers:,}"
        if spec.model.moe is not None:
            routers = "one router" if encoder.routers == "shared" else "a router for each modality"
            position = "beside" if encoder.experts == "beside" else "in place of"
            text += f"; experts {position} the feed-forward layers, with {routers}"
        return {"encoder": text}

    def micro_batch(self, spec: RunSpec) -> str:
        return f"{spec.tokens_per_micro_batch:,} patches and tokens"


def _encoder(model: ModelSpec) -> EncoderSpec:
    assert model.encoder is not None
    return model.encoder


def hidden_output_values(spec: RunSpec) -> int:
    """Return the number of output values for hidden patches and tokens, and for all tokens of captions.

    The values are those of a micro-batch. Texts count as if all of them had `data.seq_len` tokens.
    """
    encoder, masking, values = _encoder(spec.model), spec.train.masking, 0.0
    for part in spec.parts:
        text_values = part.samples * (spec.data.seq_len - 1) * spec.model.vocab_size
        if part.traits.writes:
            values += text_values
        if not part.traits.hides:
            continue
        is_pair = len(part.columns) > 1
        if "image" in part.columns:
            share = masking.pair_image if is_pair else masking.image
            values += part.samples * share * encoder.patches * encoder.target_values
        if "text" in part.columns:
            share = masking.pair_text if is_pair else masking.text
            values += share * text_values
    return round(values)
