from mhmoe_ray.data.shards.manifest import TEMPLATE_FILE, ChatData, read_data_manifest
from mhmoe_ray.storage import describe_file, file_problem
from tests.data.shards.folders import expected_reports, make_folders
from tests.data.shards.verify_by_tasks import verification_report


def test_file_problem_reports_wrong_and_missing_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("one")
    sha256 = describe_file(path).sha256
    assert file_problem(path, sha256) is None
    path.write_text("two")
    assert file_problem(path, sha256) == "its content is not what was written"
    path.unlink()
    assert file_problem(path, sha256) == "it is missing"


def test_verify_shards_reports_the_first_problem(tmp_path):
    folders = make_folders(tmp_path)
    assert [verification_report(folder) for folder in folders] == expected_reports(folders)


def test_verify_shards_checks_the_chat_template(tmp_path):
    folder, *_ = make_folders(tmp_path)
    (folder / TEMPLATE_FILE).write_text("one")
    manifest = read_data_manifest(folder)
    template_hash = describe_file(folder / TEMPLATE_FILE).sha256
    manifest.chat = ChatData(template_sha256=template_hash, start_token=0, turn_ends=[0])
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    assert verification_report(folder) == "sound"
    (folder / TEMPLATE_FILE).write_text("two")
    assert "chat_template.jinja: its content is not what was written" in verification_report(folder)
