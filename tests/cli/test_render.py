"""`mhmoe cluster render` as users call it; tests/render checks what it writes."""

from hashlib import sha256
from pathlib import Path

import pytest
import yaml

from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run
from tests.cli.run import assert_one_line, mhmoe

SITE = str(Path(__file__).parents[2] / "cluster/site.yaml")


@pytest.fixture
def served(tmp_path):
    """Write a run below the folder that its site's nodes share; return the path of its rendered service and the words
    of the command that renders it."""
    run = make_run(tmp_path, MIXTRAL)
    site = yaml.safe_load(Path(SITE).read_text())
    site["storage"]["mount"] = str(tmp_path)
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    return tmp_path / "out/kuberay" / f"rayservice-{run.id}.yaml", (
        *("cluster", "render", "site.yaml", "--into", "out", "--serve", run.id),
    )


def test_a_service_has_the_keys_of_the_environment_as_hashes(tmp_path, served):
    file, words = served
    assert mhmoe(tmp_path, *words, MHMOE_API_KEYS="ann:secret-word").err == ""
    assert "secret-word" not in file.read_text()
    config = yaml.safe_load(yaml.safe_load(file.read_text())["spec"]["serveConfigV2"])
    [key] = config["applications"][0]["args"]["serve"]["keys"]
    assert (key["name"], key["sha256"]) == ("ann", sha256(b"secret-word").hexdigest())


def test_a_service_that_is_open_is_said(tmp_path, served):
    file, words = served
    result = mhmoe(tmp_path, *words)
    assert result.code == 0
    assert result.err == "warning: whoever reaches the service may ask; serve.keys or MHMOE_API_KEYS limit it\n"
    assert file.exists()


def test_mistakes_of_the_command_line(tmp_path):
    (tmp_path / "file").touch()
    for words, why in [
        (("--into", "file"), "--into file: Not a directory; name a folder that you can write to"),
        (("--set", "train.steps=5"), "name one with --run"),
    ]:
        refused = mhmoe(tmp_path, "cluster", "render", SITE, *words)
        assert refused.code == 2, refused
        assert why in " ".join(refused.err.split())
    assert_one_line(mhmoe(tmp_path, "cluster", "render", "no.yaml"), 3, "spec no.yaml")
