import itertools
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from mhmoe_ray.corpus.clean import is_english
from mhmoe_ray.corpus.large import Written, write_large
from mhmoe_ray.corpus.packages import PACKAGES, language_of
from mhmoe_ray.corpus.readers import read_code
from mhmoe_ray.corpus.small import english_parts
from tests.corpus.made_packages import made, page, records_of, write_deb, write_wheel

pytestmark = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="there is no dpkg-deb")

ENGLISH = [f"Sentence {i} of a manual, which says what one can do with the thing it came with." for i in range(6)]
MENU = "Bookmarks, Toolbar, Sidebar, Panel, Window, Options, Dialog, Preferences, Zoom, Clipboard"
"""English text that cannot be recognised as English by its words."""
GERMAN = [f"Satz {i} eines Handbuchs, der sagt, was man mit dem Ding tun kann, zu dem es gehört." for i in range(700)]
MANUAL = made("Debian", "p-doc", r"usr/share/p/(?P<language>[^/]+)/.*\.html")
CODE = made("PyPI", "P==1.0", r"p/.*\.py", read_code, "github")
ABSENT = made("Debian", "absent-doc", r".*")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    files = {
        "usr/share/doc/p-doc/copyright": b"License: MIT",
        "usr/share/p/de/a.html": page(*GERMAN[:350], ENGLISH[0], MENU),
        "usr/share/p/de/b.html": page(*GERMAN[350:]),
        "usr/share/p/hr/a.html": page(*(f"Rečenica {i} u kojoj nešto piše o svemu." for i in range(20))),
        "usr/share/p/en/a.html": page(*ENGLISH, MENU),
    }
    write_deb(folder / "Debian" / "p-doc_1%3a2_all.deb", files)
    code = "\n".join(f"x_{i} = {i}" for i in range(100)).encode()
    write_wheel(
        folder / "PyPI" / "p-1.0-py3-none-any.whl", {"p/a.py": code, "p-1.0.dist-info/licenses/LICENSE": b"MIT text"}
    )
    return folder


def write(folder: Path, cache: Path) -> tuple[Written, list[str]]:
    lines = list[str]()
    few = {name: itertools.islice(records, 5) for name, records in english_parts().items()}
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # no client that could reach a network, and little of the installed text
        patch.setattr("mhmoe_ray.corpus.fetch.client", lambda origin: None)
        patch.setattr("mhmoe_ray.corpus.large.english_parts", lambda: few)
        return write_large(folder, cache, lines.append, (MANUAL, ABSENT, CODE)), lines


@pytest.fixture(scope="module")
def sample(tmp_path_factory, cache) -> tuple[Path, Written, list[str]]:
    folder = tmp_path_factory.mktemp("sample")
    return folder, *write(folder, cache)


def _records(folder: Path) -> list[tuple[str, dict]]:
    return [
        (str(path.parent.relative_to(folder)), json.loads(line))
        for path in sorted(folder.rglob("*.jsonl.zst"))
        for line in pa.input_stream(str(path)).read().splitlines()
    ]


def test_every_record_names_its_source_licence_and_language(sample):
    folder, written, _ = sample
    records = _records(folder)
    for domain, record in records:
        meta = record["meta"]
        assert meta["source"]
        assert meta["license"]
        assert meta["url"]
        assert meta["language"] == (domain.removeprefix("multilingual/") if "multi" in domain else "en")
    of_package = [r["meta"] for _, r in records if r["meta"]["source"] == "p-doc 1:2 (Debian)"]
    assert {m["license"] for m in of_package} == {"MIT"}
    assert {m["language"] for m in of_package} == {"en", "de"}
    assert len(records) == sum(written.documents.values())
    assert (folder / "licenses" / "p-doc.txt").read_text() == "License: MIT"
    assert (folder / "licenses" / "P.txt").read_text() == "MIT text"


def test_english_comes_first_whatever_the_package_s_order(sample):
    folder, _, _ = sample
    assert not is_english(MENU)
    german = [r["text"] for domain, r in _records(folder) if domain == "multilingual/de"]
    assert german == ["\n".join(GERMAN[:350]), "\n".join(GERMAN[350:])]


def test_a_language_of_a_few_pages_is_left_out(sample):
    folder, written, _ = sample
    assert not (folder / "multilingual" / "hr").exists()
    assert "multilingual/hr" not in written.documents


def test_our_readers_read_all_of_it(sample):
    folder, written, _ = sample
    assert len(records_of(folder / "redpajama")) + len(records_of(folder / "multilingual")) == sum(
        written.documents.values()
    )


def test_what_is_missing_is_said_in_a_line(sample):
    _, written, lines = sample
    assert len(written.missing) == 1
    assert [line for line in lines if line.startswith("warning: ")] == [f"warning: {written.missing[0]}"]
    assert "packages of Debian: there is no apt-get here" in written.missing[0]
    assert written.downloaded == 0
    assert "not 100 MB and 15" in (written.shortfall() or "")


def test_the_same_packages_give_the_same_bytes(sample, cache, tmp_path):
    folder, written, _ = sample
    assert write(tmp_path, cache)[0] == written
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_goal_reached_is_no_shortfall():
    sizes = {"redpajama/c4": 90_000_000} | {f"multilingual/{i}": 1_000_000 for i in range(14)}
    assert Written(bytes=sizes).shortfall() is None
    assert Written(bytes=sizes | {"multilingual/1": 999_999}).shortfall()


@pytest.mark.parametrize(
    ("tag", "language"),
    [
        ("C", "en"),
        ("de", "de"),
        ("pt_BR", "pt-BR"),
        ("zh_CN", "zh-CN"),
        ("en_GB", None),
        ("sr@latin", None),
        ("ca@valencia", None),
    ],
)
def test_languages_by_their_folder(tag, language):
    gnome = next(p for p in PACKAGES if p.name == "gnome-user-docs")
    assert language_of(f"usr/share/help/{tag}/gnome-help/about.page", gnome) == language
    assert language_of(f"usr/share/help/{tag}/gnome-help/about.png", gnome) is None


def test_the_table_is_sound():
    assert len({p.name for p in PACKAGES}) == len(PACKAGES)
    for package in PACKAGES:
        assert package.license
        assert (package.origin == "PyPI") == ("==" in package.name)
