"""Tests that the name of a part, the file of a tokenised chunk, depends on the annotations of its images."""

from mhmoe_ray.data.images.annotations import Annotation, Instance, pack
from mhmoe_ray.data.prepare.chunks import DocumentChunk
from mhmoe_ray.data.prepare.tokenise import TokenisedChunk, tokenise_chunk
from mhmoe_ray.data.sources import Document, Tally
from mhmoe_ray.data.tokenizer.train import train_bpe

NAME_WITHOUT_ANNOTATIONS = "536376c1f7d4fc1742b7a1c6ee37b31b773e8569"
"""Name of the part of `DOCUMENTS`. It must not change, because parts that earlier versions have written are reused."""
DOCUMENTS = [Document("", 1, image=b"image", image_hash="hash"), Document("a boat", 2)]


def test_a_part_is_named_by_its_annotations(tmp_path):
    train_bpe(["a boat on the sea"], 300).save(str(tmp_path / "tokenizer.json"))

    def part_name(*annotations):
        documents = [document._replace(annotation=a) for document, a in zip(DOCUMENTS, annotations, strict=True)]
        chunk = DocumentChunk(0, 0, documents, Tally(), False)
        assert DocumentChunk.from_table(chunk.as_table()) == chunk
        row = tokenise_chunk(
            chunk.as_table(),
            tokenizer=tmp_path / "tokenizer.json",
            parts=tmp_path / "parts",
            tokenizer_sha256="1",
            validation_fraction=0.5,
            token_bytes=2,
            row_tokens=8,
        )
        return TokenisedChunk.from_row({key: value for key, [value] in row.items()}).part.name

    objects = Annotation(image_id=7, instances=(Instance("boat", (0.0, 0.5, 2.0, 3.0), None),))
    contents = [pack(Annotation("boat")), pack(Annotation("moon")), pack(objects), pack(objects._replace(image_id=8))]
    names = [part_name(None, None), *(part_name(content, None) for content in contents), part_name(None, contents[0])]
    assert names[0] == NAME_WITHOUT_ANNOTATIONS
    assert len(set(names)) == len(names)
