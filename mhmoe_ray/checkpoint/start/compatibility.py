"""Checks that a run can start from given models: the sizes, options and tokenizers of the models must fit the run."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from mhmoe_ray.checkpoint.huggingface.adapters import computed_function
from mhmoe_ray.checkpoint.huggingface.tokenizer import tokenizer_identity
from mhmoe_ray.checkpoint.start.source import StartModel
from mhmoe_ray.errors import SpecError
from mhmoe_ray.spec import ModelSpec, MoESpec, StartSpec
from mhmoe_ray.spec.parts import OBJECTIVES
from mhmoe_ray.storage import Location

POSITION_KEYS = {"rope_theta", "rope_scaling"}
"""Keys of a `model` section that a run may change at its start, to read longer texts, although the results change."""

ENCODER_HEADS = [traits.head for traits in OBJECTIVES.values() if traits.head is not None]
"""Keys of `model.encoder` that give a model the head of an objective."""


def check_start(start: StartSpec, model: ModelSpec, start_models: Sequence[StartModel]) -> None:
    """Check that a model can get its first weights from the models of `start.from` as `start.how` says.

    A SpecError names the first key in which they differ, or says that there is no optimizer state to copy.
    """
    checks = {"copy": _copy_problems, "upcycle": _upcycle_problems, "mix": _mix_problems}
    first_model = start_models[0]
    if start.optimizer and not first_model.has_moments:
        reason = "start.optimizer is true, but it has no state of an optimizer"
        raise SpecError(f"start.from {first_model.ancestor.name}", reason, "set start.optimizer to false")
    for other_model in start_models[1:]:
        for difference in _differences(other_model.model, first_model.model, "model."):
            reason = f"{other_model.ancestor.name} and {first_model.ancestor.name} have different models: {difference}"
            raise SpecError("start.from", reason, "mix runs that began from the same model")
    for reason, fix in checks[start.how](model, first_model.model, len(start_models)):
        raise SpecError(f"start.from {first_model.ancestor.name}", reason, fix)
    _check_new_experts(start, model, first_model.model)
    encoder, start_encoder = model.encoder, first_model.model.encoder
    for key in ENCODER_HEADS if start.optimizer and encoder and start_encoder else ():
        if getattr(encoder, key) and not getattr(start_encoder, key):
            reason = f"start.optimizer is true, but the head of model.encoder.{key} is new and has no state"
            raise SpecError(f"start.from {first_model.ancestor.name}", reason, "set start.optimizer to false")
    domains, start_domains = _expert_names(model), _expert_names(first_model.model)
    if start.optimizer and domains != start_domains:
        # The moments are copied in the order of the experts, and new experts have none.
        reason = f"start.optimizer is true, but its experts are {', '.join(start_domains)}, in this order"
        fix = "set start.optimizer to false, or model.moe.domains to the same names"
        raise SpecError(f"start.from {first_model.ancestor.name}", reason, fix)


def _expert_names(model: ModelSpec) -> list[str]:
    return (model.moe and model.moe.domains) or []


def _check_new_experts(start: StartSpec, model: ModelSpec, start_model: ModelSpec) -> None:
    """Check that `start.new_experts` maps new experts to experts of the start model; SpecError for a wrong name.

    Only router `domain` gives experts names.
    """
    domains, start_domains = _expert_names(model), _expert_names(start_model)
    for new_name, old_name in start.new_experts.items():
        if new_name not in domains or new_name in start_domains:
            new_names = ", ".join(name for name in domains if name not in start_domains) or "none"
            raise SpecError(f"start.new_experts.{new_name}", "it is no new expert", f"the new ones are {new_names}")
        if old_name not in start_domains:
            reason = f"the start has no expert {old_name}"
            raise SpecError(f"start.new_experts.{new_name}", reason, f"choose from {', '.join(start_domains)}")


def _differences(
    model: ModelSpec, start_model: ModelSpec, prefix: str, ignored_keys: Collection[str] = ()
) -> Iterator[str]:
    """Yield a text about each key by which two models compute differently."""
    fields, start_fields = computed_function(model), computed_function(start_model)
    yield from _field_differences(fields, start_fields, prefix, ignored_keys)


def _field_differences(
    fields: dict[str, Any], start_fields: dict[str, Any], prefix: str, ignored_keys: Collection[str]
) -> Iterator[str]:
    # The keys have the order of the spec, in which a width comes before the widths that are computed from it. So the
    # difference that explains the others is reported first.
    for key in {**fields, **start_fields}:
        value, start_value = fields.get(key), start_fields.get(key)
        if key in ignored_keys or value == start_value:
            continue
        if isinstance(value, dict) and isinstance(start_value, dict):
            yield from _field_differences(value, start_value, f"{prefix}{key}.", ignored_keys)
        else:
            yield f"{prefix}{key} is {_text(value)} here and {_text(start_value)} there"


def _text(value: Any) -> str:
    return "not set" if value is None else "a section" if isinstance(value, dict) else str(value)


def _copy_problems(model: ModelSpec, start_model: ModelSpec, count: int) -> Iterator[tuple[str, str]]:
    """Yield a reason and a fix for each difference that prevents a plain copy of the weights."""
    ignored_keys = set(POSITION_KEYS)
    # The selection biases of a router begin at zero, where they change nothing, so a run may add them.
    if model.moe and start_model.moe and not start_model.moe.bias_rate:
        ignored_keys.add("bias_rate")
    # The head of an objective may be added with its initial values, or left out.
    if (encoder := model.encoder) and (start_encoder := start_model.encoder):
        heads = ((key, getattr(encoder, key), getattr(start_encoder, key)) for key in ENCODER_HEADS)
        ignored_keys |= {key for key, head, start_head in heads if not head or not start_head}
    # Experts that are named by their domains may be added, left out and reordered.
    if model.moe and start_model.moe and model.moe.router == start_model.moe.router == "domain":
        ignored_keys |= {"experts", "domains"}
    for difference in _differences(model, start_model, "model.", ignored_keys):
        yield difference, "remove that key, or set start.how to upcycle to turn a model into one with other experts"


def _trunk_problems(model: ModelSpec, start_model: ModelSpec) -> Iterator[tuple[str, str]]:
    """Yield a reason and a fix for each difference outside of the experts, and for a missing `model.moe` section."""
    for difference in _differences(model, start_model, "model.", {"moe", "d_ff", *POSITION_KEYS}):
        yield difference, "remove that key: all but the experts stays as it is"
    if model.moe is None:
        yield "model.moe is missing, so there are no experts to make", "add model.moe, or set start.how to copy"
    elif model.d_ff is not None and model.d_ff != start_model.d_ff:
        yield f"model.d_ff is {model.d_ff} here and {_text(start_model.d_ff)} there", "remove that key"


def _copied_expert_problems(moe: MoESpec, d_ff: int) -> Iterator[tuple[str, str]]:
    """Yield a reason and a fix for each option with which copies of a dense layer would not compute the same."""
    required_values = {"d_expert": d_ff, "gate_scale": 1.0, "sub_token_residual": False}
    # The gates of a token must add up to 1. Those of router `domain` do so without `normalize_gates`.
    if moe.router != "domain":
        required_values["normalize_gates"] = True
    for key, required_value in required_values.items():
        if getattr(moe, key) != required_value:
            reason = f"model.moe.{key} is {getattr(moe, key)}, and copies of a dense layer of width {d_ff} as experts"
            yield f"{reason} compute what it does only with {required_value}", f"set it to {required_value}"
    if moe.has_head_projection or moe.has_merge_projection:
        yield "model.moe.head_projection or merge_projection is true with copies as experts", "remove the projections"


def _shared_expert_problems(moe: MoESpec, d_ff: int) -> Iterator[tuple[str, str]]:
    """Yield a reason and a fix for each option that keeps the dense layer from becoming the shared expert."""
    if moe.d_shared != d_ff:
        reason = f"model.moe.d_shared is {moe.d_shared}, and the dense layers there have width {d_ff}"
        yield reason, f"set model.moe.d_shared to {d_ff}: with {moe.heads} heads the dense layer becomes shared"
    if not moe.has_merge_projection:
        yield "model.moe.merge_projection is false, so experts could not begin with no effect", "remove that key"


def _upcycle_problems(model: ModelSpec, start_model: ModelSpec, count: int) -> Iterator[tuple[str, str]]:
    """Yield each reason, with a fix, why an upcycled model would not compute the same as its start model."""
    yield from _trunk_problems(model, start_model)
    moe = model.moe
    assert moe is not None
    if start_model.moe is None:
        assert start_model.d_ff is not None
        is_shared = moe.heads > 1 or moe.d_shared > 0
        yield from (_shared_expert_problems if is_shared else _copied_expert_problems)(moe, start_model.d_ff)
        return
    yield from _mixture_problems(model, start_model, moe, start_model.moe)


def _mixture_problems(
    model: ModelSpec, start_model: ModelSpec, moe: MoESpec, start_moe: MoESpec
) -> Iterator[tuple[str, str]]:
    """Yield each reason, with a fix, why an MH-MoE layer would compute differently from a sparse mixture of experts."""
    if start_moe.heads > 1:
        yield f"it has {start_moe.heads} heads already", "set start.how to copy"
    if moe.heads == 1:
        yield "it is a mixture of experts already, and model.moe.heads is 1", "set start.how to copy, or heads to 2"
    if start_moe.has_head_projection or start_moe.has_merge_projection:
        yield "its experts have projections around them", "set start.how to copy"
    if model.row_width != model.d_model:
        reason = f"model.moe.d_sub_token is {model.row_width}, and the experts there take rows of {model.d_model}"
        yield reason, f"set it to {model.d_model}"
    if (
        moe.sub_token_residual
        or moe.projection_layers != 1
        or not (moe.has_head_projection and moe.has_merge_projection)
    ):
        reason = "model.moe needs one linear layer in each projection and no sub_token_residual"
        yield reason, "remove sub_token_residual, projection_layers, head_projection and merge_projection"
    changed_keys = {"heads", "d_sub_token", "head_projection", "merge_projection"}
    for difference in _differences(model, start_model, "model.", {*changed_keys, *POSITION_KEYS}):
        yield difference, "remove that key: the experts stay as they are"


def _mix_problems(model: ModelSpec, start_model: ModelSpec, count: int) -> Iterator[tuple[str, str]]:
    """Yield each reason, with a fix, why `count` dense models cannot become the experts of one model."""
    if start_model.moe is not None:
        yield "it has experts, and only dense models can be mixed", "mix dense models"
    yield from _trunk_problems(model, start_model)
    moe = model.moe
    assert moe is not None
    assert start_model.d_ff is not None
    if moe.experts != count:
        yield f"model.moe.experts is {moe.experts}, and start.from names {count} models", f"set it to {count}"
    if moe.heads > 1 or moe.d_shared:
        yield "how: mix makes experts on whole tokens", "set model.moe.heads to 1 and d_shared to 0"
    yield from _copied_expert_problems(moe, start_model.d_ff)


def check_tokenizer(start_model: StartModel, tokenizer_file: Location) -> None:
    """Check that the tokenizer of a run's data encodes text like that of the start model; SpecError if not."""
    content, start_content = tokenizer_file.read_bytes(), start_model.tokenizer_file.read_bytes()
    if content == start_content or tokenizer_identity(content) == tokenizer_identity(start_content):
        return
    reason = f"{start_model.ancestor.name} has another tokenizer than the data, {tokenizer_file}"
    fix = f"set data.tokenizer to {start_model.tokenizer_file} and data.prepared to a new folder"
    raise SpecError("start.from", reason, fix)
