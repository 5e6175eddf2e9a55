import os
from pathlib import Path

import pytest

from mhmoe_ray.data.sources import RawFile, Reason, blocks_of, find_files
from mhmoe_ray.errors import DataError, SpecError
from mhmoe_ray.spec import DataSpec, checked
from tests.data.sources.read import bad, data_spec, read, texts
from tests.data.texts import write_corpus, write_documents
from tests.specs import tiny_spec


def found(path, **source) -> list[tuple[str, str]]:
    return [(f.domain, f.path.rpartition("/")[2]) for f in find_files(data_spec(path, **source))]


def test_files_are_found_by_domain_in_the_order_of_their_names(tmp_path):
    write_corpus(tmp_path / "raw")
    files = find_files(tiny_spec(tmp_path).data)
    assert [f.domain for f in files] == ["web/a", "web/a", "web/b", "web/c"]
    assert [f.path for f in files] == sorted(f.path for f in files)
    assert all(f.size == Path(f.path).stat().st_size for f in files)


def test_a_subfolder_is_a_domain_whatever_lies_deeper(tmp_path):
    for name in ("b/2023-06/x.jsonl", "a/z.jsonl", "a-b/y.jsonl", "top.jsonl", ".git/w.jsonl", "b/_tmp/v.jsonl"):
        write_documents(tmp_path / name, ["text"])
    (tmp_path / "a" / "README.txt").write_text("not data")
    assert found(tmp_path) == [
        *(("web/a", "z.jsonl"), ("web/a-b", "y.jsonl"), ("web/b", "x.jsonl"), ("web/all", "top.jsonl")),
    ]
    assert found(tmp_path, shares={"b": 1}) == [("web/b", "x.jsonl")]


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
def test_patterns_and_single_files(tmp_path, pattern, expected):
    for name in ("a/part-00", "a/part-01", "a/part-10", "b/part-00", "b/deep/deep"):
        write_documents(tmp_path / f"{name}.jsonl", ["text"])
    files = [f"{domain.removeprefix('web/')}/{name}" for domain, name in found(tmp_path / pattern)]
    assert files == expected


def test_a_pattern_that_is_none_is_said(tmp_path):
    write_documents(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(DataError, match=r"pattern \[z-a\]\*: bad character range z-a; correct it"):
        found(tmp_path / "[z-a]*")


def test_a_source_has_no_slash_in_its_name():
    """A slash ends the source in the name of a domain."""
    with pytest.raises(SpecError, match=r"sources\.wiki/en\..*should match pattern"):
        checked(DataSpec, {"sources": {"wiki/en": {"path": "x"}}, "prepared": "p", "seq_len": 8}, "spec")


def test_a_pattern_and_a_format_take_files_of_any_name(tmp_path):
    write_documents(tmp_path / "a" / "shard-1", ["text"])
    with pytest.raises(DataError, match="holds no file ending in"):
        found(tmp_path)
    assert texts(read(tmp_path / "a" / "shard-*", format="jsonl")[0]) == ["text"]
    assert texts(read(tmp_path / "a" / "shard-1", format="jsonl")[0]) == ["text"]
    write_documents(tmp_path / "a" / "shard-2", ["text"])
    for pattern in ("shard-*", "shard-?", "shard-[12]"):
        assert texts(read(tmp_path / "a" / pattern, format="jsonl")[0]) == ["text", "text"]


def test_a_folder_may_be_named_like_a_pattern(tmp_path):
    write_documents(tmp_path / "[en]" / "f.jsonl", ["text"])
    assert found(tmp_path / "[en]") == [("web/all", "f.jsonl")]


def test_links_are_followed_and_a_circle_ends(tmp_path):
    write_documents(tmp_path / "elsewhere" / "f.jsonl", ["linked"])
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "raw")
    (tmp_path / "elsewhere" / "self").symlink_to(".")
    assert texts(read(tmp_path / "raw")[0]) == ["linked"]


def test_what_preparing_leaves_below_a_source_is_no_part_of_it(tmp_path):
    for name in ("a", "out-of-print"):
        write_documents(tmp_path / "raw" / name / "f.jsonl", ["text"])
    (tmp_path / "linked").symlink_to("raw")
    sources = {name: {"path": path} for name, path in {"whole": "raw", "link": "linked", "some": "raw/**"}.items()}
    spec = tiny_spec(tmp_path, data={"sources": sources, "prepared": "raw/out"}).data
    before = find_files(spec)
    for name in ("out/quarantine.jsonl", "out.partial-0a1b/parts/00.tokens", "out.partial-0a1b/c2/quarantine/0.jsonl"):
        write_documents(tmp_path / "raw" / name, ["text"])
    assert find_files(spec) == before
    assert {file.domain for file in before} == {f"{name}/{sub}" for name in sources for sub in ("a", "out-of-print")}


def test_nor_is_what_was_prepared_with_other_settings(tmp_path):
    write_documents(tmp_path / "raw" / "a" / "f.jsonl", ["text"])
    write_documents(tmp_path / "raw" / "b" / "manifest.json", ["text"])
    write_documents(tmp_path / "raw" / "b" / "g.jsonl", ["text"])
    before = find_files(tiny_spec(tmp_path).data)
    for name in ("manifest.json", "tokenizer.json", "quarantine.jsonl", "train/00000.arrow"):
        write_documents(tmp_path / "raw" / "prepared-2048" / name, ["text"])
    write_documents(tmp_path / "raw" / "prepared-512.partial-0a1b2c3d" / "d4" / "quarantine" / "0.jsonl", ["text"])
    assert find_files(tiny_spec(tmp_path).data) == before
    assert {file.domain for file in before} == {"web/a", "web/b"}
    for pattern in ("raw/**/*.jsonl", "raw/*/*.jsonl"):
        assert {name for _, name in found(tmp_path / pattern)} == {"f.jsonl", "g.jsonl"}


def test_names_that_no_storage_has_are_said(tmp_path):
    for path in ("s3:///data", "gs://", str(tmp_path / "a\0b")):
        spec = tiny_spec(tmp_path, data={"sources": {"web": {"path": path}}}).data
        with pytest.raises(DataError, match=r"^source web: .* cannot be listed: .*; correct data.sources"):
            find_files(spec)


def test_files_that_are_small_and_many_share_blocks():
    def files(*sizes):
        return [RawFile("web/a", f"/{i}", size, "jsonl") for i, size in enumerate(sizes)]

    def rows(*sizes):
        blocks = blocks_of(files(*sizes))
        assert [row["number"] for block in blocks for row in block.to_pylist()] == list(range(len(sizes)))
        return [block.num_rows for block in blocks]

    assert rows(*[1 << 30] * 7) == [1] * 7
    assert rows(*[100] * 1000) == [1] * 1000
    assert rows(*[100] * 100_000) == [100] * 1000
    assert rows(*[1 << 20] * 10_000) == [4] * 2500
    assert rows(*[100] * 10_000, *[8 << 20] * 5)[-5:] == [2, 1, 1, 1, 1]


@pytest.mark.parametrize(("to", "detail"), [("nowhere", "not there any more"), ("g.jsonl", "Failed to open")])
def test_a_link_to_nothing_or_to_itself_is_a_file_that_vanished(tmp_path, to, detail):
    write_documents(tmp_path / "a" / "f.jsonl", ["text"])
    (tmp_path / "a" / "g.jsonl").symlink_to(to)
    items, tally = read(tmp_path)
    assert (texts(items), bad(items)) == (["text"], [(1, Reason.LOST)])
    assert detail in items[-1].detail
    assert tally.damaged == 1


def test_a_name_that_is_not_text_is_said_where_its_file_is_wanted(tmp_path):
    write_documents(tmp_path / "a" / "f.jsonl", ["text"])
    (tmp_path / "b").mkdir()
    for name in (b"a/\xe9.txt", b"b/caf\xe9.jsonl"):
        (tmp_path / os.fsdecode(name)).touch()
    assert found(tmp_path, shares={"a": 1}) == [("web/a", "f.jsonl")]
    with pytest.raises(DataError, match=r"source web: the name of .*/b/caf\\udce9\.jsonl is not UTF-8; rename it") as e:
        found(tmp_path)
    assert str(e.value).isascii()


def test_a_pipe_is_no_file(tmp_path):
    write_documents(tmp_path / "a" / "f.jsonl", ["text"])
    os.mkfifo(tmp_path / "a" / "g.jsonl")
    assert texts(read(tmp_path)[0]) == ["text"]


def test_missing_folders_and_domains_are_named(tmp_path):
    with pytest.raises(DataError, match=r"source web: there is no folder .*/raw; .* mhmoe data sample"):
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


def test_what_cannot_be_told_by_its_name_must_be_named(tmp_path):
    write_documents(tmp_path / "a" / "f.jsonl", ["text"])
    (tmp_path / "a" / "g.parquet").touch()
    with pytest.raises(DataError, match="formats jsonl and parquet; name one"):
        found(tmp_path)
    assert found(tmp_path, format="jsonl") == [("web/a", "f.jsonl")]
    with pytest.raises(DataError, match="is a file of format text"):
        found(tmp_path, format="text")
    (tmp_path / "a" / "g.parquet").unlink()
    with pytest.raises(DataError, match=r"filters go by .* take the key out of data\.sources\.web"):
        found(tmp_path, filters={"gopher": True})


@pytest.mark.parametrize("path", ["ftp://host/folder", "hdfs://host/folder"])
def test_other_schemes_are_refused(path):
    with pytest.raises(DataError, match="is not known; use a local path, s3:// or gs://"):
        found(path)


def test_a_local_path_may_be_a_uri(tmp_path):
    write_documents(tmp_path / "f.jsonl", ["text"])
    assert texts(read(f"file://{tmp_path}")[0]) == ["text"]
