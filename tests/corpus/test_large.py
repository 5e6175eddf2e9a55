import itertools
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from mhmoe_ray.corpus.clean import is_english
from mhmoe_ray.corpus.large import LargeSummary, write_large_sample
from mhmoe_ray.corpus.packages import PACKAGES, file_language
from mhmoe_ray.corpus.readers import read_code
from mhmoe_ray.corpus.small import english_records
from tests.corpus.made_packages import html_page, make_package, read_documents, write_deb, write_wheel

pytestmark = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="there is no dpkg-deb")

ENGLISH = [f"Sentence {i} of a manual, which says what one can do with the thing it came with." for i in range(6)]
MENU = "Bookmarks, Toolbar, Sidebar, Panel, Window, Options, Dialog, Preferences, Zoom, Clipboard"
"""English text without the words by which English is recognised."""
GERMAN = [f"Satz {i} eines Handbuchs, der sagt, was man mit dem Ding tun kann, zu dem es gehört." for i in range(700)]
MANUAL = make_package("Debian", "p-doc", r"usr/share/p/(?P<language>[^/]+)/.*\.html")
CODE = make_package("PyPI", "P==1.0", r"p/.*\.py", read_code, "github")
ABSENT = make_package("Debian", "absent-doc", r".*")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Write a package cache with a Debian package of manuals in English, German and Croatian, and a wheel of code."""
    folder = tmp_path_factory.mktemp("cache")
    files = {
        "usr/share/doc/p-doc/copyright": b"License: MIT",
        "usr/share/p/de/a.html": html_page(*GERMAN[:350], ENGLISH[0], MENU),
        "usr/share/p/de/b.html": html_page(*GERMAN[350:]),
        "usr/share/p/hr/a.html": html_page(*(f"Rečenica {i} u kojoj nešto piše o svemu." for i in range(20))),
        "usr/share/p/en/a.html": html_page(*ENGLISH, MENU),
    }
    write_deb(folder / "Debian" / "p-doc_1%3a2_all.deb", files)
    code = "\n".join(f"x_{i} = {i}" for i in range(100)).encode()
    write_wheel(
        folder / "PyPI" / "p-1.0-py3-none-any.whl", {"p/a.py": code, "p-1.0.dist-info/licenses/LICENSE": b"MIT text"}
    )
    return folder


def write_test_sample(folder: Path, cache: Path) -> tuple[LargeSummary, list[str]]:
    """Write a large sample from the packages in `cache`; return its summary and the lines that were printed."""
    lines = list[str]()
    english_subset = {name: itertools.islice(records, 5) for name, records in english_records().items()}
    with pytest.MonkeyPatch.context() as monkeypatch:
        # Without a download command, the test cannot reach a network. Five records of each folder are enough.
        monkeypatch.setattr("mhmoe_ray.corpus.fetch.download_command", lambda origin: None)
        monkeypatch.setattr("mhmoe_ray.corpus.large.english_records", lambda: english_subset)
        return write_large_sample(folder, cache, lines.append, (MANUAL, ABSENT, CODE)), lines


@pytest.fixture(scope="module")
def sample(tmp_path_factory, cache) -> tuple[Path, LargeSummary, list[str]]:
    """Write a large sample; return its folder, its summary, and the lines that were printed."""
    folder = tmp_path_factory.mktemp("sample")
    return folder, *write_test_sample(folder, cache)


def read_sample(folder: Path) -> list[tuple[str, dict]]:
    """Return the domain and the JSON record of each line below `folder`."""
    return [
        (str(path.parent.relative_to(folder)), json.loads(line))
        for path in sorted(folder.rglob("*.jsonl.zst"))
        for line in pa.input_stream(str(path)).read().splitlines()
    ]


def test_records_name_their_source_licence_and_language(sample):
    folder, summary, _ = sample
    records = read_sample(folder)
    for domain, record in records:
        meta = record["meta"]
        assert meta["source"]
        assert meta["license"]
        assert meta["url"]
        assert meta["language"] == (domain.removeprefix("multilingual/") if "multi" in domain else "en")
    package_meta = [r["meta"] for _, r in records if r["meta"]["source"] == "p-doc 1:2 (Debian)"]
    assert {m["license"] for m in package_meta} == {"MIT"}
    assert {m["language"] for m in package_meta} == {"en", "de"}
    assert len(records) == sum(summary.documents.values())
    assert (folder / "licenses" / "p-doc.txt").read_text() == "License: MIT"
    assert (folder / "licenses" / "P.txt").read_text() == "MIT text"


def test_sample_reads_english_before_translations(sample):
    folder, _, _ = sample
    assert not is_english(MENU)
    german_texts = [r["text"] for domain, r in read_sample(folder) if domain == "multilingual/de"]
    assert german_texts == ["\n".join(GERMAN[:350]), "\n".join(GERMAN[350:])]


def test_sample_leaves_out_a_language_of_a_few_pages(sample):
    folder, summary, _ = sample
    assert not (folder / "multilingual" / "hr").exists()
    assert "multilingual/hr" not in summary.documents


def test_sample_is_readable_as_training_data(sample):
    folder, summary, _ = sample
    assert len(read_documents(folder / "redpajama")) + len(read_documents(folder / "multilingual")) == sum(
        summary.documents.values()
    )


def test_sample_prints_a_warning_for_a_missing_package(sample):
    _, summary, lines = sample
    assert len(summary.missing_packages) == 1
    assert [line for line in lines if line.startswith("warning: ")] == [f"warning: {summary.missing_packages[0]}"]
    assert "packages of Debian: there is no apt-get here" in summary.missing_packages[0]
    assert summary.downloaded == 0
    assert "not 100 MB and 15" in (summary.describe_shortfall() or "")


def test_sample_is_the_same_for_the_same_packages(sample, cache, tmp_path):
    folder, summary, _ = sample
    assert write_test_sample(tmp_path, cache)[0] == summary
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_describe_shortfall_is_none_at_the_goal():
    sizes = {"redpajama/c4": 90_000_000} | {f"multilingual/{i}": 1_000_000 for i in range(14)}
    assert LargeSummary(bytes=sizes).describe_shortfall() is None
    assert LargeSummary(bytes=sizes | {"multilingual/1": 999_999}).describe_shortfall()


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
def test_file_language_reads_the_language_of_the_folder(tag, language):
    gnome_package = next(p for p in PACKAGES if p.name == "gnome-user-docs")
    assert file_language(f"usr/share/help/{tag}/gnome-help/about.page", gnome_package) == language
    assert file_language(f"usr/share/help/{tag}/gnome-help/about.png", gnome_package) is None


def test_packages_have_unique_names_and_licences():
    assert len({p.name for p in PACKAGES}) == len(PACKAGES)
    for package in PACKAGES:
        assert package.license
        assert (package.origin == "PyPI") == ("==" in package.name)
