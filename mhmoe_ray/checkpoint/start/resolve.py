"""Load a spec, with defaults from the models that the run starts from.

A spec with a `start` section gets the following keys from the start model by default. They depend on `start.how`:

    copy      model, data.seq_len, data.tokenizer; for conversations also data.chat_template
    upcycle   the keys of copy, but of model.moe only some: from a dense model, the options with which its dense layers
              can become experts or shared experts; from a sparse mixture, all options but those for sub-tokens
    mix       the keys of upcycle, with one expert for each model
"""

from collections.abc import Callable
from functools import partial

from mhmoe_ray.checkpoint.start.compatibility import check_start, check_tokenizer
from mhmoe_ray.checkpoint.start.source import (
    SWEEP_PREFIX,
    StartModel,
    find_start_model,
    sibling_model,
    sweep_variant,
)
from mhmoe_ray.data.shards.manifest import TOKENIZER_FILE
from mhmoe_ray.data.tokenizer.tiktoken import is_tiktoken
from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.presets import Tree
from mhmoe_ray.planner.resolve import merge_trees, resolve_spec
from mhmoe_ray.spec import MoESpec, RunSpec, StartSpec, validate_section
from mhmoe_ray.spec.formats import CHAT_FORMATS
from mhmoe_ray.storage import Location, default_storage, location

TOKENIZER_KEYS = {"tokenizer", "tokenizer_pattern", "tokenizer_model", "tokenizer_train_mb"}
FindSibling = Callable[[str], RunSpec]
"""Function from the name of a variant in a sweep to the spec of its run."""


def build_spec(tree: Tree, label: str, find_sibling: FindSibling | None = None) -> RunSpec:
    """Return the checked, complete spec for the nested dictionaries of a spec file, which may be changed in place.

    `label` names the spec in error messages; `find_sibling` is None outside of a sweep. A wrong spec or an impossible
    start is a SpecError; a start model that cannot be read is a RunError, CheckpointError or DataError.
    """
    start_models: list[StartModel] = []
    fill_tree = partial(_fill_from_start, find_sibling=find_sibling, start_models=start_models)
    spec = resolve_spec(tree, label, fill_tree)
    if spec.start is not None:
        check_start(spec.start, spec.model, start_models)
        _check_tokenizers(spec, start_models)
    return spec


def _check_tokenizers(spec: RunSpec, start_models: list[StartModel]) -> None:
    """Check that the tokenizer of a run's data, if it exists already, is that of the start models; SpecError if not."""
    files = (spec.data.prepared / TOKENIZER_FILE, spec.data.tokenizer)
    tokenizer_file = next((file for file in files if file is not None and file.is_file()), None)
    # A vocabulary in tiktoken's format is not checked here: the job converts it, and checks the result.
    if tokenizer_file is None or is_tiktoken(tokenizer_file.read_bytes()):
        return
    for start_model in start_models:
        # Another run of the same sweep may not have its tokenizer yet. The job checks that one.
        if start_model.sibling is None:
            check_tokenizer(start_model, tokenizer_file)


def _fill_from_start(tree: Tree, label: str, find_sibling: FindSibling | None, start_models: list[StartModel]) -> Tree:
    """Return a spec's nested dictionaries with defaults from the start models; append these to `start_models`."""
    if tree.get("start") is None:
        return tree
    start = validate_section(StartSpec, tree["start"], label, prefix="start.")
    storage = str(tree.get("storage", default_storage()))
    own_model, own_data = tree.get("model") or {}, tree.get("data") or {}
    if not (isinstance(own_model, dict) and isinstance(own_data, dict)):
        # If a section is not a mapping, the later check of the complete spec reports it.
        return tree
    for source in start.sources:
        start_models.append(_find_model(source, storage, find_sibling))
    first_model = start_models[0]
    model = _model_defaults(start, first_model, own_model, len(start_models))
    if model["d_ff"] is None and own_model.get("d_ff") == first_model.model.d_ff:
        # The spec file repeats the width of the start model's dense layers, but no layer of the new model is dense.
        own_model = {key: value for key, value in own_model.items() if key != "d_ff"}
    data: Tree = {"seq_len": first_model.seq_len}
    if first_model.sibling is not None and _reads_same_folder(own_data, first_model.sibling):
        # The run starts from another run of the same sweep, which prepares the data, perhaps with a tokenizer that it
        # trains. So its settings for the tokenizer are taken over.
        data |= first_model.sibling.data.model_dump(mode="json", include=TOKENIZER_KEYS)
    else:
        data["tokenizer"] = str(first_model.tokenizer_file)
    if first_model.chat_template is not None and "chat_template" not in own_data and _has_conversations(own_data):
        data["chat_template"] = str(_template_file(first_model))
    resolved_start = start.with_sources([start_model.source for start_model in start_models])
    return {
        **tree,
        "start": resolved_start.model_dump(mode="json"),
        "model": merge_trees(model, own_model),
        "data": {**data, **own_data},
    }


def _has_conversations(own_data: Tree) -> bool:
    sources = own_data.get("sources")
    return isinstance(sources, dict) and any(
        isinstance(source, dict) and source.get("format") in CHAT_FORMATS for source in sources.values()
    )


def _template_file(start_model: StartModel) -> Location:
    """Return the file of a model's chat template; SpecError if the template has no file of its own."""
    if start_model.chat_template_file is None:
        reason = "its chat template is no file of its own"
        fix = "set data.chat_template, or run `mhmoe ckpt import` and start from the imported run"
        raise SpecError(f"start.from {start_model.ancestor.name}", reason, fix)
    return start_model.chat_template_file


def _reads_same_folder(own_data: Tree, sibling: RunSpec) -> bool:
    folder = own_data.get("prepared")
    return isinstance(folder, str) and location(folder).absolute() == sibling.data.prepared.absolute()


def _find_model(source: str, storage: str, find_sibling: FindSibling | None) -> StartModel:
    """Return the model of `start.from`; a name of another run outside of a sweep is a SpecError."""
    if not source.startswith(SWEEP_PREFIX):
        return find_start_model(source, storage)
    if find_sibling is None:
        raise SpecError(
            f"start.from {source}", "it names a run of a sweep", "give the file of the sweep to `mhmoe sweep`"
        )
    return sibling_model(source, find_sibling(sweep_variant(source)))


def _model_defaults(start: StartSpec, start_model: StartModel, own_model: Tree, count: int) -> Tree:
    """Return the defaults of a run's `model` section from the first of its `count` start models."""
    model = start_model.model
    tree: Tree = model.model_dump(mode="json")
    own_moe = own_model.get("moe") or {}
    if start.how == "copy" or not isinstance(own_moe, dict):
        return tree
    moe: Tree = {}
    if model.moe is not None:
        moe = {**model.moe.model_dump(mode="json"), "heads": 2, "d_sub_token": model.d_model}
        moe |= {"head_projection": None, "merge_projection": None}
    elif start.how == "mix":
        moe = {"heads": 1, "experts": count, "d_expert": model.d_ff}
    elif own_moe.get("heads", MoESpec.model_fields["heads"].default) == 1 and not own_moe.get("d_shared"):
        moe = {"d_expert": model.d_ff}
    else:
        moe = {"d_shared": model.d_ff}
    if "d_expert" in moe and model.moe is None:
        moe |= {"top_k": 1} if own_moe.get("router") == "domain" else {"normalize_gates": True}
    spacing = own_moe.get("every", moe.get("every", MoESpec.model_fields["every"].default))
    has_dense_layers = spacing != 1 or own_moe.get("dense_first", moe.get("dense_first", 0))
    return {**tree, "d_ff": model.d_ff if has_dense_layers else None, "moe": moe}
