"""Kinds of files that are fuzzed: a project folder with valid files of each kind, and the readers of these files."""

import gzip
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from mhmoe_ray.data.sources import FileReader, find_files
from mhmoe_ray.spec import DataSpec
from tests.fuzz.harness import Kind, run_command

ROOT = Path(__file__).parents[2]
OLD_RUN = ROOT / "tests" / "fixtures" / "old_run"
RUN = "old-ea8ec3"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def make_project(folder: Path) -> None:
    """Write a project with a valid file of each kind."""
    shutil.copytree(OLD_RUN / "prepared", folder / "prepared")
    shutil.copytree(OLD_RUN / RUN, folder / "runs" / RUN)
    spec = folder / "runs" / RUN / "spec.yaml"
    text = spec.read_text()
    for part in ("runs", "prepared"):
        text = text.replace(f" /tmp/old-run/{part}\n", f" {folder / part}\n")
    spec.write_text(text)
    for name in ("quickstart", "vision", "multilingual", "domains", "retrieval"):
        shutil.copy(ROOT / "jobs" / f"{name}.yaml", folder)
    assert run_command(folder, "ckpt", "export", RUN, "--to", "exported") == 0
    (folder / "exported" / "chat_template.jinja").write_text(TEMPLATE)
    _write_sources(folder / "data")


def _write_sources(data: Path) -> None:
    """Write one small source of each format."""
    data.mkdir()
    rows = [{"text": f"The hill {i} is above the sea.", "id": i, "meta": {"date": "2026-01-02"}} for i in range(20)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (data / "jsonl").mkdir()
    (data / "jsonl" / "a.jsonl").write_text(lines)
    (data / "packed").mkdir()
    (data / "packed" / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (data / "text").mkdir()
    (data / "text" / "a.txt").write_text("One hill.\nTwo seas.\n")
    (data / "parquet").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), data / "parquet" / "a.parquet")
    (data / "huggingface").mkdir()
    with pa.OSFile(str(data / "huggingface" / "data-00000-of-00001.arrow"), "wb") as sink:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (data / "huggingface" / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"})
    )
    (data / "chat").mkdir()
    turns = [{"role": "user", "content": "Hill?"}, {"role": "assistant", "content": "Sea."}]
    (data / "chat" / "a.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(10)))
    image = _jpeg(0)
    (data / "images" / "cats").mkdir(parents=True)
    for i in range(4):
        (data / "images" / "cats" / f"{i}.jpg").write_bytes(_jpeg(i))
    (data / "webdataset").mkdir()
    with tarfile.open(data / "webdataset" / "0.tar", "w") as tar:
        for i in range(4):
            for name, content in ((f"{i}.jpg", _jpeg(i)), (f"{i}.txt", b"A grey square.")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (data / "coco" / "images").mkdir(parents=True)
    (data / "coco" / "images" / "0.jpg").write_bytes(image)
    tree = {
        "images": [{"id": 1, "file_name": "0.jpg", "width": 32, "height": 24}],
        "categories": [{"id": 1, "name": "square"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 8, 8], "iscrowd": 0, "area": 64,
             "segmentation": [[2, 2, 10, 2, 10, 10, 2, 10]]},
        ],
    }  # fmt: skip
    (data / "coco" / "a.json").write_text(json.dumps(tree))


def _jpeg(seed: int) -> bytes:
    """Return a small image with an orientation in its EXIF data."""
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), np.uint8)
    image, stream = Image.fromarray(pixels), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 1 + seed % 8
    image.save(stream, "JPEG", exif=exif)
    return stream.getvalue()


def _command(*args: str) -> Any:
    return lambda folder: run_command(folder, *args)


def _read_spec(folder: Path) -> int:
    return max(run_command(folder, "plan", str(file)) for file in _damaged_specs(folder))


def _damaged_specs(folder: Path) -> list[Path]:
    """Return the specs of a project that differ from the shipped ones, which is the damaged one alone."""
    changed = [f for f in folder.glob("*.yaml") if not f.is_file() or f.read_bytes() != _shipped(f.name)]
    return changed or [folder / "quickstart.yaml"]


def _shipped(name: str) -> bytes:
    return (ROOT / "jobs" / name).read_bytes()


def _read_run(folder: Path) -> int:
    path = f"runs/{RUN}"
    commands = [["list"], ["status", path], ["ckpt", "inspect", path]]
    return max(run_command(folder, *command) for command in commands)


def _source(name: str, **settings: Any) -> Any:
    """Return a function that reads all documents of one source."""

    def read(folder: Path) -> int:
        tree = {"sources": {"s": {"path": str(folder / "data" / name), **settings}}, "prepared": "p", "seq_len": 64}
        spec = DataSpec.model_validate(tree)
        for file in find_files(spec):
            for _ in FileReader(file, spec):
                pass
        return 0

    return read


def _read_prepared(folder: Path) -> int:
    spec = yaml.safe_load((folder / "runs" / RUN / "spec.yaml").read_text())
    spec["data"]["prepared"] = str(folder / "prepared")
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    return max(run_command(folder, "data", "mix", "spec.yaml"), run_command(folder, "plan", "spec.yaml"))


KINDS: dict[str, Kind] = {
    "specs": Kind(("*.yaml",), _read_spec),
    "run files": Kind((f"runs/{RUN}/*.json", f"runs/{RUN}/*.jsonl", f"runs/{RUN}/*.yaml"), _read_run),
    "reports": Kind((f"runs/{RUN}/*.jsonl",), _command("report", f"runs/{RUN}", "--to", "report"), 20),
    "checkpoint manifests": Kind(
        (f"runs/{RUN}/checkpoints/*/manifest.json",), _command("ckpt", "inspect", f"runs/{RUN}")
    ),
    "weights": Kind((f"runs/{RUN}/checkpoints/*/*/*",), _command("ckpt", "verify", f"runs/{RUN}")),
    "configs": Kind(("exported/*.json",), _command("ckpt", "import", "exported")),
    "imported weights": Kind(("exported/*.safetensors",), _command("ckpt", "import", "exported")),
    "templates": Kind(("exported/*.jinja",), _command("ckpt", "import", "exported"), 4),
    "prepared data": Kind(("prepared/*.json",), _read_prepared),
    "jsonl": Kind(("data/jsonl/*",), _source("jsonl")),
    "gzip": Kind(("data/packed/*",), _source("packed")),
    "text": Kind(("data/text/*",), _source("text")),
    "parquet": Kind(("data/parquet/*",), _source("parquet")),
    "huggingface": Kind(("data/huggingface/*",), _source("huggingface")),
    "chat": Kind(("data/chat/*",), _source("chat", format="chat")),
    "images": Kind(("data/images/*/*",), _source("images", format="images", columns=["image", "class"])),
    "webdataset": Kind(("data/webdataset/*",), _source("webdataset", format="webdataset", columns=["image", "text"])),
    "coco": Kind(("data/coco/*.json",), _source("coco", format="coco", columns=["image", "objects"])),
}
