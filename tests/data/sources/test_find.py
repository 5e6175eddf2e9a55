import os
from pathlib import Path

import pytest

from mhmoe_ray.data.sources import RawFile, Reason, file_blocks, find_files
from mhmoe_ray.data.sources.find import fingerprints, source_errors
from mhmoe_ray.errors import DataError, SpecError
from mhmoe_ray.spec import DataSpec, validate_section
from tests.data.sources.read import bad_lines, data_spec, document_texts, read_source
from tests.data.texts import write_corpus, write_documents
from tests.support.specs import tiny_spec


def domains_and_names(path, **source) -> list[tuple[str, str]]:
    return [(f.domain, f.path.rpartition("/")[2]) for f in find_files(data_spec(path, **source))]


def test_find_files_sorts_files_by_path(tmp_path):
    write_corpus(tmp_path / "raw")
    files = find_files(tiny_spec(tmp_path).data)
    assert [f.domain for f in files] == ["web/a", "web/a", "web/b", "web/c"]
    assert [f.path for f in files] == sorted(f.path for f in files)
    assert all(f.size == Path(f.path).stat().st_size for f in files)


def test_find_files_makes_a_domain_of_each_subfolder(tmp_path):
    for name in ("b/2023-06/x.jsonl", "a/z.jsonl", "a-b/y.jsonl", "top.jsonl", ".git/w.jsonl", "b/_tmp/v.jsonl"):
        write_documents(tmp_path / name, ["text"])
    (tmp_path / "a" / "README.txt").write_text("not data")
    assert domains_and_names(tmp_path) == [
        *(("web/a", "z.jsonl"), ("web/a-b", "y.jsonl"), ("web/b", "x.jsonl"), ("web/all", "top.jsonl")),
    ]
    assert domains_and_names(tmp_path, shares={"b": 1}) == [("web/b", "x.jsonl")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*/part-0*.jsonl", ["a/part-00.jsonl", "a/part-01.jsonl", "b/part-00.jsonl"]),
        ("a/part-0[!0].jsonl", ["all/part-01.jsonl"]),
        ("a/part-?[01].jsonl", ["all/part-00.jsonl", "all/part-01.jsonl", "all/part-10.jsonl"]),
        ("**/*.jsonl", ["a/part-00.jsonl", "a/part-01.jsonl", "a/part-10.jsonl", "b/deep.jsonl", "b/part-00.jsonl"]),
        ("b/**", ["deep/deep.jsonl", "all/part-00.jsonl"]),
        ("[a]/part-10.jsonl", ["a/part-10.jsonl"]),
        ("b/part-00.jsonl", ["all/part-00.jsonl"]),
    ],
)
def test_find_files_takes_patterns_and_single_files(tmp_path, pattern, expected):
    for name in ("a/part-00", "a/part-01", "a/part-10", "b/part-00", "b/deep/deep"):
        write_documents(tmp_path / f"{name}.jsonl", ["text"])
    files = [f"{domain.removeprefix('web/')}/{name}" for domain, name in domains_and_names(tmp_path / pattern)]
    assert files == expected


def test_find_files_reports_a_wrong_pattern(tmp_path):
    write_documents(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(DataError, match=r"pattern \[z-a\]\*: bad character range z-a; correct it"):
        domains_and_names(tmp_path / "[z-a]*")


def test_source_name_with_a_slash_is_rejected():
    """A slash separates source and subfolder in the name of a domain, so a source's name must not contain one."""
    with pytest.raises(SpecError, match=r"sources\.wiki/en\..*should match pattern"):
        validate_section(DataSpec, {"sources": {"wiki/en": {"path": "x"}}, "prepared": "p", "seq_len": 8}, "spec")


def test_find_files_takes_any_suffix_with_a_pattern_and_a_format(tmp_path):
    write_documents(tmp_path / "a" / "shard-1", ["text"])
    with pytest.raises(DataError, match="holds no file ending in"):
        domains_and_names(tmp_path)
    assert document_texts(read_source(tmp_path / "a" / "shard-*", format="jsonl")[0]) == ["text"]
    assert document_texts(read_source(tmp_path / "a" / "shard-1", format="jsonl")[0]) == ["text"]
    write_documents(tmp_path / "a" / "shard-2", ["text"])
    for pattern in ("shard-*", "shard-?", "shard-[12]"):
        assert document_texts(read_source(tmp_path / "a" / pattern, format="jsonl")[0]) == ["text", "text"]


def test_find_files_accepts_a_folder_named_like_a_pattern(tmp_path):
    write_documents(tmp_path / "[en]" / "f.jsonl", ["text"])
    assert domains_and_names(tmp_path / "[en]") == [("web/all", "f.jsonl")]


def test_find_files_follows_links_once(tmp_path):
    write_documents(tmp_path / "elsewhere" / "f.jsonl", ["linked"])
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "raw")
    (tmp_path / "elsewhere" / "self").symlink_to(".")
    assert document_texts(read_source(tmp_path / "raw")[0]) == ["linked"]


def test_find_files_ignores_the_prepared_folder(tmp_path):
    for name in ("a", "out-of-print"):
        write_documents(tmp_path / "raw" / name / "f.jsonl", ["text"])
    (tmp_path / "linked").symlink_to("raw")
    sources = {name: {"path": path} for name, path in {"whole": "raw", "link": "linked", "some": "raw/**"}.items()}
    spec = tiny_spec(tmp_path, data={"sources": sources, "prepared": "raw/out"}).data
    expected_files = find_files(spec)
    for name in ("out/quarantine.jsonl", "out.partial-0a1b/parts/00.tokens", "out.partial-0a1b/c2/quarantine/0.jsonl"):
        write_documents(tmp_path / "raw" / name, ["text"])
    assert find_files(spec) == expected_files
    assert {file.domain for file in expected_files} == {
        f"{name}/{sub}" for name in sources for sub in ("a", "out-of-print")
    }


def test_find_files_ignores_other_prepared_folders(tmp_path):
    write_documents(tmp_path / "raw" / "a" / "f.jsonl", ["text"])
    write_documents(tmp_path / "raw" / "b" / "manifest.json", ["text"])
    write_documents(tmp_path / "raw" / "b" / "g.jsonl", ["text"])
    expected_files = find_files(tiny_spec(tmp_path).data)
    for name in ("manifest.json", "tokenizer.json", "quarantine.jsonl", "train/00000.arrow"):
        write_documents(tmp_path / "raw" / "prepared-2048" / name, ["text"])
    write_documents(tmp_path / "raw" / "prepared-512.partial-0a1b2c3d" / "d4" / "quarantine" / "0.jsonl", ["text"])
    assert find_files(tiny_spec(tmp_path).data) == expected_files
    assert {file.domain for file in expected_files} == {"web/a", "web/b"}
    for pattern in ("raw/**/*.jsonl", "raw/*/*.jsonl"):
        assert {name for _, name in domains_and_names(tmp_path / pattern)} == {"f.jsonl", "g.jsonl"}


def test_find_files_reports_impossible_paths(tmp_path):
    for path in ("s3:///data", "gs://", str(tmp_path / "a\0b")):
        spec = tiny_spec(tmp_path, data={"sources": {"web": {"path": path}}}).data
        with pytest.raises(DataError, match=r"^source web: .* cannot be listed: .*; correct data.sources"):
            find_files(spec)


def test_file_blocks_put_many_small_files_together():
    def make_files(*sizes):
        return [RawFile("web/a", f"/{i}", size, "jsonl") for i, size in enumerate(sizes)]

    def row_counts(*sizes):
        blocks = file_blocks(make_files(*sizes))
        assert [row["number"] for block in blocks for row in block.to_pylist()] == list(range(len(sizes)))
        return [block.num_rows for block in blocks]

    assert row_counts(*[1 << 30] * 7) == [1] * 7
    assert row_counts(*[100] * 1000) == [1] * 1000
    assert row_counts(*[100] * 100_000) == [100] * 1000
    assert row_counts(*[1 << 20] * 10_000) == [4] * 2500
    assert row_counts(*[100] * 10_000, *[8 << 20] * 5)[-5:] == [2, 1, 1, 1, 1]


@pytest.mark.parametrize(("target", "detail"), [("nowhere", "no longer exists"), ("g.jsonl", "Failed to open")])
def test_broken_link_is_a_damaged_file(tmp_path, target, detail):
    write_documents(tmp_path / "a" / "f.jsonl", ["text"])
    (tmp_path / "a" / "g.jsonl").symlink_to(target)
    items, tally = read_source(tmp_path)
    assert (document_texts(items), bad_lines(items)) == (["text"], [(1, Reason.PART_LOST)])
    assert detail in items[-1].detail
    assert tally.damaged == 1
    # A broken link is no error of `fingerprints`, because the reader reports it. Removing the link changes them.
    spec = data_spec(tmp_path)
    fingerprint = fingerprints(spec, find_files(spec))
    (tmp_path / "a" / "g.jsonl").unlink()
    assert fingerprints(spec, find_files(spec)) != fingerprint


def test_find_files_reports_a_name_that_is_not_utf8(tmp_path):
    write_documents(tmp_path / "a" / "f.jsonl", ["text"])
    (tmp_path / "b").mkdir()
    for name in (b"a/\xe9.txt", b"b/caf\xe9.jsonl"):
        (tmp_path / os.fsdecode(name)).touch()
    assert domains_and_names(tmp_path, shares={"a": 1}) == [("web/a", "f.jsonl")]
    with pytest.raises(DataError, match=r"source web: the name of .*/b/caf\\udce9\.jsonl is not UTF-8; rename it") as e:
        domains_and_names(tmp_path)
    assert str(e.value).isascii()


def test_find_files_ignores_a_pipe(tmp_path):
    write_documents(tmp_path / "a" / "f.jsonl", ["text"])
    os.mkfifo(tmp_path / "a" / "g.jsonl")
    assert document_texts(read_source(tmp_path)[0]) == ["text"]


def test_find_files_names_missing_folders_and_domains(tmp_path):
    with pytest.raises(DataError, match=r"source web: there is no file or folder .*/raw; .* mhmoe data sample"):
        find_files(tiny_spec(tmp_path).data)
    (tmp_path / "raw" / "x").mkdir(parents=True)
    with pytest.raises(DataError, match="there is no file below"):
        find_files(tiny_spec(tmp_path).data)
    (tmp_path / "raw" / "x" / "f.warc").touch()
    with pytest.raises(DataError, match=r"holds no file ending in \.jsonl, "):
        find_files(tiny_spec(tmp_path).data)
    write_documents(tmp_path / "raw" / "y" / "f.jsonl", ["text"])
    with pytest.raises(DataError, match=r"web/x: .* has no file of format jsonl for it"):
        find_files(tiny_spec(tmp_path).data)
    shares = {"sources": {"web": {"path": "raw", "shares": {"nowhere": 1}}}}
    with pytest.raises(DataError, match="web/nowhere"):
        find_files(tiny_spec(tmp_path, data=shares).data)
    # A later phase of training may name a subfolder, while the first phase reads all of them.
    (tmp_path / "raw" / "x" / "f.warc").unlink()
    (tmp_path / "raw" / "x").rmdir()
    schedule = [{"from_step": 2, "sources": {"web": {"shares": {"y": 1, "nowhere": 1}}}}]
    with pytest.raises(DataError, match=r"web/nowhere: .* has no file of format jsonl for it"):
        find_files(tiny_spec(tmp_path, data={"schedule": schedule}).data)
    schedule[0]["sources"]["web"]["shares"].pop("nowhere")
    assert [file.domain for file in find_files(tiny_spec(tmp_path, data={"schedule": schedule}).data)] == ["web/y"]


def test_find_files_needs_a_format_for_mixed_files(tmp_path):
    write_documents(tmp_path / "a" / "f.jsonl", ["text"])
    (tmp_path / "a" / "g.parquet").touch()
    with pytest.raises(DataError, match="formats jsonl and parquet; name one"):
        domains_and_names(tmp_path)
    assert domains_and_names(tmp_path, format="jsonl") == [("web/a", "f.jsonl")]
    with pytest.raises(DataError, match="is a file of format text"):
        domains_and_names(tmp_path, format="text")
    (tmp_path / "a" / "g.parquet").unlink()
    with pytest.raises(DataError, match=r"filters go by .* remove the key from data\.sources\.web"):
        domains_and_names(tmp_path, filters={"gopher": True})


@pytest.mark.parametrize("path", ["ftp://host/folder", "hdfs://host/folder"])
def test_find_files_rejects_unknown_schemes(path):
    with pytest.raises(DataError, match="is not known; use a local path, s3:// or gs://"):
        domains_and_names(path)


def test_find_files_accepts_a_file_uri(tmp_path):
    write_documents(tmp_path / "f.jsonl", ["text"])
    assert document_texts(read_source(f"file://{tmp_path}")[0]) == ["text"]


def test_file_uri_is_a_local_source(tmp_path):
    """A missing folder is reported before a job starts, while a source in an object store is left to the job."""
    [error] = source_errors(data_spec(f"file://{tmp_path}/missing"))
    assert f"there is no file or folder {tmp_path}/missing" in str(error)


@pytest.mark.parametrize(
    ("columns", "format", "folder", "arguments"),
    [
        (["text"], "text", "missing", "data/sample"),
        (["text"], "text", "data/large/redpajama", "--large data/large"),
        (["image", "text"], "webdataset", "missing", "data/pictures --pictures"),
        (["image", "objects"], "coco", "missing", "data/scenes --scenes"),
    ],
)
def test_missing_source_names_the_command_of_its_sample(tmp_path, columns, format, folder, arguments):
    [error] = source_errors(data_spec(tmp_path / folder, columns=columns, format=format))
    assert str(error).endswith(f"make sample data: mhmoe data sample {arguments}")
