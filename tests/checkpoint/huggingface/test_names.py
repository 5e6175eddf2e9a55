import re

import torch
from hypothesis import given, settings

from mhmoe_ray.checkpoint.huggingface.names import NAME_TABLE, tensor_entries
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.spec import MoESpec
from tests.checkpoint.huggingface.conftest import MODELS
from tests.checkpoint.huggingface.strategies import model_specs


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
