import re

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.architectures import ARCHITECTURES
from mhmoe_ray.checkpoint.huggingface.names import NAME_TABLE, tensor_entries
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.router import SCORES_BY_ROUTER
from mhmoe_ray.spec import ModelSpec, MoESpec
from tests.checkpoint.huggingface.conftest import MODELS


@st.composite
def model_specs(draw) -> ModelSpec:
    """Draw the spec of a small model of any architecture, with or without mixture-of-experts layers."""
    backbone = draw(st.sampled_from(list(ARCHITECTURES)))
    heads = draw(st.sampled_from([1, 2, 4]))
    head, merge = draw(st.tuples(*[st.none() | st.booleans()] * 2))
    is_projected = [heads > 1 if projection is None else projection for projection in (head, merge)]
    layers = draw(st.integers(1, 3))
    moe = MoESpec(
        heads=heads,
        d_sub_token=draw(st.sampled_from([None, 3, 16])) if all(is_projected) else None,
        experts=draw(st.integers(2, 12)),
        d_expert=draw(st.integers(1, 6)),
        every=draw(st.integers(1, layers)),
        head_projection=head,
        merge_projection=merge,
        projection_layers=draw(st.integers(1, 3)) if any(is_projected) else 1,
        d_shared=draw(st.integers(0, 3)),
        router=draw(st.sampled_from(list(SCORES_BY_ROUTER))),
        bias_rate=draw(st.sampled_from([0.0, 0.1])),
    )
    moe = draw(st.sampled_from([moe, moe, None]))
    return ModelSpec(
        backbone=backbone,
        vocab_size=7,
        d_model=16,
        layers=layers,
        attention_heads=4,
        kv_heads=draw(st.sampled_from([None, 1, 2])) if ARCHITECTURES[backbone].grouped_queries else None,
        d_ff=None if moe and moe.every == 1 else draw(st.integers(1, 5)),
        tied_embeddings=draw(st.booleans()),
        moe=moe,
    )


@settings(max_examples=60)
@given(model_specs())
def test_every_tensor_is_exported_once_and_can_be_imported(spec):
    tensors = Decoder(spec).named_tensors()
    for tensor in tensors.values():
        torch.nn.init.normal_(tensor)
    all_entries = [entry for group in tensor_entries(spec) for entry in group]
    assert [e.checkpoint_name for e in all_entries] == sorted(
        {e.checkpoint_name for e in all_entries}, key=[e.checkpoint_name for e in all_entries].index
    )
    assert {e.checkpoint_name: e.shape for e in all_entries} == {name: tuple(t.shape) for name, t in tensors.items()}
    names = [name for entry in all_entries for name in entry.exported_names]
    assert len(names) == len(set(names))
    assert sum(part.numel() for e in all_entries for part in e.split(tensors[e.checkpoint_name]).values()) == sum(
        t.numel() for t in tensors.values()
    )
    for entry in all_entries:
        parts = entry.split(tensors[entry.checkpoint_name])
        assert {name: tuple(part.shape) for name, part in parts.items()} == entry.shapes
        assert torch.equal(entry.join(list(parts.values())), tensors[entry.checkpoint_name])


def test_every_row_of_the_table_is_used():
    specs = [*MODELS.values(), *(m.model_copy(update={"moe": MoESpec(d_expert=4)}) for m in MODELS.values() if m.d_ff)]
    used_names = {
        name for spec in specs for group in tensor_entries(spec) for entry in group for name in (entry.checkpoint_name,)
    }
    for checkpoint_name, _ in NAME_TABLE:
        pattern = re.escape(checkpoint_name).replace(r"\{i\}", r"\d").replace(r"\{n\}", r"\d").replace(r"\{p\}", r"\w+")
        assert any(re.fullmatch(pattern, name) for name in used_names), checkpoint_name


def test_each_group_holds_one_layer():
    groups = tensor_entries(MODELS["llama"])
    assert len(groups) == 1 + MODELS["llama"].layers
    for layer, group in enumerate(groups[1:]):
        assert all(name.startswith(f"model.layers.{layer}.") for entry in group for name in entry.exported_names)
