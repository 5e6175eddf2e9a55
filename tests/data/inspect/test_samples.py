import numpy as np
import pytest

from mhmoe_ray.data.inspect.samples import decode_samples
from mhmoe_ray.data.order.mixture import training_order
from mhmoe_ray.data.shards.columns import TOKENS, padding_token
from mhmoe_ray.data.shards.files import to_batch, write_shard
from mhmoe_ray.data.sources import find_files
from mhmoe_ray.data.tokenizer import END_OF_TEXT, train_tokenizer
from mhmoe_ray.errors import DataError
from tests.data.shards.manifests import make_manifest
from tests.data.texts import write_corpus
from tests.support.specs import tiny_spec


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Write a prepared folder; return its spec, tokenizer, samples as token ids by domain, and training order.

    The last 5 of 25 tokens of each sample of web/c are padding.
    """
    folder = tmp_path_factory.mktemp("project")
    texts = write_corpus(folder / "raw")
    spec = tiny_spec(folder, data={"seq_len": 24})
    tokenizer = train_tokenizer(find_files(spec.data), spec.data, spec.model.vocab_size)
    end, rows, shards = tokenizer.token_to_id(END_OF_TEXT), {}, {}
    spec.data.prepared.mkdir()
    tokenizer.save(str(spec.data.prepared / "tokenizer.json"))
    for name, domain_texts in texts.items():
        stream = np.concatenate([[end, *tokenizer.encode(text).ids] for text in domain_texts])
        count = (len(stream) - 1) // 24
        rows[name] = stream[np.arange(count)[:, None] * 24 + np.arange(25)]
        if name == "web/c":
            rows[name][:, 20:] = padding_token(2)
        shards[name] = [
            write_shard(
                spec.data.prepared,
                f"train/{name}/00000.arrow",
                to_batch({TOKENS: rows[name].astype(np.uint16)}),
            )
        ]
    manifest = make_manifest({name: len(domain_rows) for name, domain_rows in rows.items()})
    manifest = manifest.model_copy(
        update={"domains": {n: d.model_copy(update={"shards": shards[n]}) for n, d in manifest.domains.items()}}
    )
    (spec.data.prepared / "manifest.json").write_text(manifest.model_dump_json())
    return spec, tokenizer, rows, training_order(spec, manifest)


def test_decode_samples_follows_the_training_order(prepared):
    spec, tokenizer, rows, (names, order) = prepared
    sample_count = spec.train.steps * spec.samples_per_step
    samples = decode_samples(spec, range(sample_count))
    domain, sample = order(np.arange(sample_count))
    part_kinds = set()
    for position, decoded_sample in enumerate(samples):
        assert (decoded_sample.position, decoded_sample.step) == (position, position // spec.samples_per_step)
        assert (decoded_sample.domain, decoded_sample.sample) == (names[domain[position]], sample[position])
        row = rows[decoded_sample.domain][decoded_sample.sample]
        unpadded_row = row[:20] if decoded_sample.domain == "web/c" else row
        assert sum(part.tokens for part in decoded_sample.parts) == len(unpadded_row) == 25 - decoded_sample.padding
        text = "".join(END_OF_TEXT * part.begins + part.text for part in decoded_sample.parts)
        assert text == tokenizer.decode(unpadded_row.tolist(), skip_special_tokens=False)
        assert all(part.begins for part in decoded_sample.parts[1:])
        part_kinds.add((len(decoded_sample.parts) > 1, decoded_sample.parts[0].begins))
    assert {(True, False), (False, False)} <= part_kinds
    assert {decoded_sample.domain for decoded_sample in samples} == set(names)


def test_decode_samples_decodes_a_range(prepared):
    assert decode_samples(prepared[0], range(37, 42)) == decode_samples(prepared[0], range(60))[37:42]


def test_decode_samples_rejects_positions_after_the_training(prepared):
    with pytest.raises(DataError, match="the training has 160; ask for positions from 0 to 159"):
        decode_samples(prepared[0], range(159, 161))
