"""Tests of the keys and values of a source in a spec."""

import pytest
from pydantic import ValidationError

from mhmoe_ray.spec import DataSpec, FilterSpec, SourceSpec
from mhmoe_ray.spec.filters import SignalRule
from tests.support.specs import tiny_spec


def test_a_path_may_be_a_uri_and_stays_one(tmp_path):
    sources = {"a": {"path": "raw/*"}, "b": {"path": "s3://bucket/x?region=eu-west-1"}, "c": {"path": "/abs"}}
    spec = tiny_spec(tmp_path, data={"sources": sources})
    paths = [s.path for s in spec.data.sources.values()]
    assert paths == [f"{tmp_path}/raw/*", "s3://bucket/x?region=eu-west-1", "/abs"]
    assert DataSpec.model_validate(spec.data.model_dump(mode="json")) == spec.data


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"format": "json"}, "Input should be 'jsonl'"),
        ({"format": "jsonl", "filters": {"gopher": True}}, "format jsonl does not have"),
        ({"format": "parquet", "delimiter": ""}, "delimiter is for format text"),
        ({"format": "text", "delimiter": "\n"}, 'delimiter is a line without its line break: "" is a blank one'),
        ({"delimiter": "---\r"}, "delimiter is a line without its line break"),
        ({"format": "text", "text_field": "body"}, "format text has none"),
        ({"format": "jsonl", "image_field": "jpg"}, "image_field is for a column of parquet or huggingface"),
        ({"format": "chat", "text_field": "body"}, "format chat has none"),
        ({"format": "chat", "delimiter": ""}, "delimiter is for format text"),
        ({"filters": {"signals": ["rps_doc_wordcount > 3"]}}, "did you mean 'rps_doc_word_count'"),
        ({"filters": {"signals": ["ccnet_perplexity"]}}, "write a rule as `signal op number`"),
        ({"filters": {"signals": ["ccnet_perplexity < many"]}}, "could not convert"),
        ({"filters": {"buckets": ["head", "tail"], "gopher": True}}, "the tail has no data that gopher needs"),
        ({"filters": {"near_duplicates": 0.75}}, "must be one of 0.7, 0.8, 0.9, 1.0"),
    ],
)
def test_an_ignored_or_misspelt_key_is_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        SourceSpec.model_validate({"path": "x", **keys})


PHOTOS = {"path": "x", "format": "parquet", "columns": ["image", "text"], "image_field": "photo"}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"path": "x", "format": "parquet"}, None),
        ({"path": "x", "format": "parquet", "image_field": "photo"}, None),
        ({"path": "y", "format": "parquet", "image_field": "thumbnail"}, None),
        ({"path": "x", "format": "parquet", "image_field": "thumbnail"}, r"different images .*photo and thumbnail\)"),
        ({"path": "x", "format": "parquet", "columns": ["image"]}, r"different images .*photo and image\)"),
    ],
)
def test_sources_of_one_path_take_the_same_image_of_a_record(texts, message):
    tree = {"sources": {"photos": PHOTOS, "texts": texts}, "prepared": "prepared", "seq_len": 8}
    if message is None:
        DataSpec.model_validate(tree)
    else:
        with pytest.raises(ValidationError, match=message):
            DataSpec.model_validate(tree)


def test_a_column_of_images_that_no_source_needs_is_refused():
    texts = {"path": "x", "format": "parquet", "image_field": "photo"}
    with pytest.raises(ValidationError, match="image_field of source texts would be ignored"):
        DataSpec.model_validate({"sources": {"texts": texts}, "prepared": "prepared", "seq_len": 8})


CHAT = {"sources": {"talk": {"path": "x", "format": "chat"}, "web": {"path": "y"}}}
MASKS = {"document_masks": True}


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        (
            CHAT,
            MASKS,
            "data.packing is concat, which cuts the conversations of data.sources.talk .*: set it to best",
        ),
        (
            {**CHAT, "packing": "best_fit"},
            {},
            "model.document_masks is false, but data.sources.talk has conversations.*: set it to true",
        ),
        ({"chat_template": "a.jinja"}, MASKS, "chat_template is for sources of format chat or preferences.*remove"),
    ],
)
def test_conversations_are_trained_whole_and_apart(data, model, message):
    with pytest.raises(ValidationError, match=message):
        tiny_spec(model=model, data=data)


PAIRS = {"sources": {"pairs": {"path": "x", "format": "preferences"}}, "packing": "best_fit"}
START = {"from": "base"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": None}, "has pairs, on which a model is compared with the one that it starts from: set start.from"),
        ({"data": {**PAIRS, "sources": {**PAIRS["sources"], "web": {"path": "y"}}}}, "remove data.sources.web"),
        ({"data": {**PAIRS, "parts": {"a": {"sources": ["pairs"], "micro_batch_size": 2}}}}, "remove data.parts"),
        ({"data": {**PAIRS, "packing": "concat"}}, "cuts the conversations of data.sources.pairs"),
        ({"train": {"loss_chunk_rows": 8}}, "train.loss_chunk_rows adds up the losses of all tokens.*: remove it"),
        ({"train": {"dpo": {"beta": 0}}}, "dpo.beta"),
        ({"data": {}, "train": {"dpo": {"beta": 1}}}, "train.dpo is for sources of format preferences"),
        (
            {"data": {"parts": {"a": {"sources": ["web"], "micro_batch_size": 2, "objective": "dpo"}}}},
            "objective dpo is for pairs",
        ),
    ],
)
def test_pairs_are_the_only_samples_of_a_run_that_starts_from_a_model(changes, message):
    assert tiny_spec(model=MASKS, data=PAIRS, start=START).loss_unit == "nats per pair"
    with pytest.raises(ValidationError, match=message):
        tiny_spec(**{"model": MASKS, "data": PAIRS, "start": START, **changes})


def test_chat_template_is_a_path_like_others(tmp_path):
    spec = tiny_spec(tmp_path, model=MASKS, data={**CHAT, "packing": "best_fit", "chat_template": "own.jinja"})
    assert (spec.data.chat_template, spec.data.chat_sources) == (tmp_path / "own.jinja", ["talk"])
    assert DataSpec.model_validate(spec.data.model_dump(mode="json")) == spec.data


@pytest.mark.parametrize(
    ("text", "kept_value", "refused_value"),
    [
        ("ccnet_perplexity<500", 499.0, 500.0),
        ("ccnet_perplexity  <= 5e2 ", 500.0, 500.1),
        ("ccnet_perplexity > -1", 0.0, -1.0),
        ("ccnet_perplexity >= 0.5", 0.5, 0.4),
        ("ccnet_bucket == 0", 0.0, 1.0),
        ("ccnet_bucket != 2", 1.0, 2.0),
    ],
)
def test_signal_rules_compare_and_never_hold_without_a_value(text, kept_value, refused_value):
    rule = SignalRule.parse(text)
    assert rule.holds(kept_value)
    assert not rule.holds(refused_value)
    assert not rule.holds(None)
    assert SignalRule.parse(str(rule)) == rule


def test_signal_rules_are_normalized():
    assert FilterSpec(signals=["ccnet_perplexity<5e2"]).signals == ["ccnet_perplexity < 500"]
