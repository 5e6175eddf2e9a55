"""Images with captions for tests, and writers of all formats that hold images."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mhmoe_ray.spec import RunSpec, SourceSpec
from tests.data.texts import make_documents
from tests.support.specs import tiny_spec

FORMATS = ("png", "jpg", "webp")


class CaptionedImage(NamedTuple):
    """Image file with a caption."""

    name: str
    """Name of the image file, without its folder."""
    image: bytes
    caption: str


def encode_image(pixels: np.ndarray, suffix: str = "png", **options) -> bytes:
    """Return an image file with these pixels, (height, width, channels) uint8."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, {"jpg": "JPEG"}.get(suffix, suffix), **options)
    return sink.getvalue()


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """Return a PNG file of a few kB whose header names billions of pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = _png_chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", header) + body + _png_chunk(b"IEND", b"")


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def jpeg_of_scans(extra_scans: int) -> bytes:
    """Return a progressive JPEG file whose last scan is repeated, with start markers of scans in a comment."""
    pixels = np.random.default_rng(7).integers(0, 256, (24, 24, 3), np.uint8)
    content = encode_image(pixels, "jpg", progressive=True, comment=b"\xff\xda" * 200)
    last_scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last_scan * extra_scans + content[-2:]


def tiff_of_tile(side: int) -> bytes:
    """Return a TIFF file with 16 grey pixels in one compressed tile, whose height and width are `side`."""
    tile = zlib.compress(bytes(256))
    # Width, height, bits, compression (deflate), photometric, channels, tile width, tile height, offset, bytes.
    tags = {256: 4, 257: 4, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(tile)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(tile)) + tile + directory


def make_images(count: int, words: int = 6, size: int = 24) -> list[CaptionedImage]:
    """Return `count` different images, the same at each call, in several formats and sizes."""
    random = np.random.default_rng(5)
    pictures = []
    for number, caption in enumerate(make_documents("image", count, words)):
        suffix = FORMATS[number % len(FORMATS)]
        pixels = random.integers(0, 256, (size + number % 5, size + number % 7, 3), np.uint8)
        pictures.append(CaptionedImage(f"{number:05d}.{suffix}", encode_image(pixels, suffix), caption))
    return pictures


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    """Write members to a tar file with the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def tar_members(pictures: list[CaptionedImage]) -> list[tuple[str, bytes]]:
    """Return the members of images in the order of WebDataset: the image, then its caption."""
    members = []
    for name, image, caption in pictures:
        members += [(name, image), (f"{name.partition('.')[0]}.txt", caption.encode())]
    return members


def write_coco(folder: Path, pictures: list[CaptionedImage], split: str = "train2017") -> Path:
    """Write images in COCO's layout: the images, and a JSON file of captions, whose path is returned."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for name, image, _ in pictures:
        (folder / split / name).write_bytes(image)
    path = folder / "annotations" / f"captions_{split}.json"
    images = [{"id": number, "file_name": picture.name} for number, picture in enumerate(pictures)]
    annotations = [{"id": n, "image_id": n, "caption": picture.caption} for n, picture in enumerate(pictures)]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def write_image_folder(folder: Path, pictures: list[CaptionedImage]) -> None:
    """Write the images of `pictures`, which are records with an image and texts, as files of one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image, _ in pictures:
        (folder / name).write_bytes(image)


def write_parquet(path: Path, pictures: list[CaptionedImage], image_field: str = "image") -> None:
    """Write images as Parquet with the images as plain bytes, as img2dataset does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {image_field: [picture.image for picture in pictures], "text": [picture.caption for picture in pictures]}
    pq.write_table(pa.table(columns), path)


def encoder_spec(folder: Path, sources: dict[str, dict], model: dict | None = None, **data) -> RunSpec:
    """Return the spec of a tiny encoder that reads sources below `folder`.

    Sources with the same columns are one part of a micro-batch.

    Args:
        folder: the folder of the relative paths.
        sources: the keys of each source.
        model: keys of `model.encoder` to change.
        data: keys of the section `data` to change.
    """
    spec_sources = {name: SourceSpec.model_validate(source) for name, source in sources.items()}
    parts = {}
    for name, source in spec_sources.items():
        part_name = "-".join(source.sample_columns)
        parts.setdefault(part_name, {"sources": [], "micro_batch_size": 2})["sources"].append(name)
    encoder = {"image_size": 32, "patch_size": 8, "text_positions": 32, **(model or {})}
    return tiny_spec(
        folder,
        model={"backbone": "subln", "tied_embeddings": False, "encoder": encoder},
        data={"sources": sources, "parts": parts, "seq_len": 32, "validation_fraction": 0.2, **data},
        train={"micro_batch_size": 2 * len(parts)},
    )
