"""Data sets of images, written by the packages `datasets` and `webdataset`."""

import webdataset
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature


def write_with_datasets(folder, images):
    """Return a data set of the package `datasets`, written to `folder` by save_to_disk and to_parquet."""
    rows = [{"image": {"bytes": p.image, "path": p.name}, "text": p.caption} for p in images]
    dataset = Dataset.from_list(rows, features=Features({"image": ImageFeature(), "text": Value("string")}))
    dataset.save_to_disk(folder / "saved")
    (folder / "parquet").mkdir()
    dataset.to_parquet(folder / "parquet" / "rows.parquet")


def write_with_webdataset(folder, images):
    """Write images by the package `webdataset` to a plain and a compressed tar file."""
    folder.mkdir()
    for part, name in ((images[::2], "a.tar"), (images[1::2], "b.tar.gz")):
        with webdataset.TarWriter(str(folder / name)) as sink:
            for picture in part:
                key, _, suffix = picture.name.partition(".")
                sink.write({"__key__": f"deep/{key}", suffix: picture.image, "txt": picture.caption, "cls": b"7"})
