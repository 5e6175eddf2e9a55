import numpy as np
import pytest

from mhmoe_ray.data.inspect.samples import decoded
from mhmoe_ray.data.order.mixture import training_order
from mhmoe_ray.data.shards.files import padding_token, write_shard
from mhmoe_ray.data.sources import find_files
from mhmoe_ray.data.tokenizer import END_OF_TEXT, train_tokenizer
from mhmoe_ray.errors import DataError
from tests.data.shards.manifests import manifest_of
from tests.data.texts import write_corpus
from tests.specs import tiny_spec


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Write a prepared folder; return its spec, its tokenizer, the rows of tokens of each domain, and the training
    order.

    The last tokens of each row of web/c are padding.
    """
    folder = tmp_path_factory.mktemp("project")
    texts = write_corpus(folder / "raw")
    spec = tiny_spec(folder, data={"seq_len": 24})
    tokenizer = train_tokenizer(find_files(spec.data), spec.data, spec.model.vocab_size)
    end, rows, shards = tokenizer.token_to_id(END_OF_TEXT), {}, {}
    spec.data.prepared.mkdir()
    tokenizer.save(str(spec.data.prepared / "tokenizer.json"))
    for name, mine in texts.items():
        stream = np.concatenate([[end, *tokenizer.encode(text).ids] for text in mine])
        count = (len(stream) - 1) // 24
        rows[name] = stream[np.arange(count)[:, None] * 24 + np.arange(25)]
        if name == "web/c":
            rows[name][:, 20:] = padding_token(2)
        shards[name] = [write_shard(spec.data.prepared, f"train/{name}/00000.arrow", rows[name].astype(np.uint16))]
    manifest = manifest_of({name: len(mine) for name, mine in rows.items()})
    manifest = manifest.model_copy(
        update={"domains": {n: d.model_copy(update={"shards": shards[n]}) for n, d in manifest.domains.items()}}
    )
    (spec.data.prepared / "manifest.json").write_text(manifest.model_dump_json())
    return spec, tokenizer, rows, training_order(spec, manifest)


def test_every_sample_of_a_training_as_it_is_ordered(prepared):
    spec, tokenizer, rows, (names, order) = prepared
    there = spec.train.steps * spec.samples_per_step
    found = decoded(spec, 0, there)
    domain, sample = order(np.arange(there))
    begun = set()
    for position, shown in enumerate(found):
        assert (shown.position, shown.step) == (position, position // spec.samples_per_step)
        assert (shown.domain, shown.sample) == (names[domain[position]], sample[position])
        row = rows[shown.domain][shown.sample]
        real = row[:20] if shown.domain == "web/c" else row
        assert sum(part.tokens for part in shown.parts) == len(real) == 25 - shown.padding
        whole = "".join(END_OF_TEXT * part.begins + part.text for part in shown.parts)
        assert whole == tokenizer.decode(real.tolist(), skip_special_tokens=False)
        assert all(part.begins for part in shown.parts[1:])
        begun.add((len(shown.parts) > 1, shown.parts[0].begins))
    assert {(True, False), (False, False)} <= begun
    assert {shown.domain for shown in found} == set(names)


def test_a_part_of_them(prepared):
    assert decoded(prepared[0], 37, 5) == decoded(prepared[0], 0, 60)[37:42]


def test_positions_that_the_training_has_not(prepared):
    with pytest.raises(DataError, match="the training has 160; ask for positions from 0 to 159"):
        decoded(prepared[0], 159, 2)
