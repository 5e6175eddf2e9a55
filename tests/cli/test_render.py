"""Tests of the command `mhmoe cluster render`; tests/render checks the files that it writes."""

from hashlib import sha256
from pathlib import Path

import pytest
import yaml

from mhmoe_ray.runs.directory import find_run
from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run
from tests.cli.run import assert_one_line, mhmoe

SITE = str(Path(__file__).parents[2] / "cluster/site.yaml")


@pytest.fixture
def rendered_service(tmp_path):
    """Write a site and a run in the site's shared storage.

    Return the path that the run's service will be rendered to, and the arguments of `mhmoe` that render it.
    """
    run = make_run(tmp_path, MIXTRAL)
    site = yaml.safe_load(Path(SITE).read_text())
    site |= {"storage": {"mount": str(tmp_path)}, "image": f"registry.example.org/mhmoe-ray@sha256:{'0' * 64}"}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    return tmp_path / "out/kuberay" / f"rayservice-{run.id}.yaml", (
        *("cluster", "render", "site.yaml", "--into", "out", "--serve", run.id),
    )


def test_service_has_hashes_of_the_keys_in_the_environment(tmp_path, rendered_service):
    file, words = rendered_service
    assert mhmoe(tmp_path, *words, MHMOE_API_KEYS="ann:secret-word").err == ""
    assert "secret-word" not in file.read_text()
    config = yaml.safe_load(yaml.safe_load(file.read_text())["spec"]["serveConfigV2"])
    [key] = config["applications"][0]["args"]["serve"]["keys"]
    assert (key["name"], key["sha256"]) == ("ann", sha256(b"secret-word").hexdigest())


def test_service_without_keys_is_a_warning(tmp_path, rendered_service):
    file, words = rendered_service
    result = mhmoe(tmp_path, *words)
    assert result.code == 0
    assert (
        result.err == "warning: the service answers everybody who reaches it; MHMOE_API_KEYS or serve.keys limit it\n"
    )
    assert file.exists()


def test_service_of_a_foreign_run_has_no_runtime_environment_of_it(tmp_path, rendered_service):
    file, words = rendered_service
    run = find_run(words[-1], tmp_path / "runs")
    spec = run.spec()
    cluster = spec.cluster.model_copy(update={"runtime_env": {"env_vars": {"WORD": "hostile"}}})
    run.write_spec(spec.model_copy(update={"cluster": cluster}))
    warning = 'these settings of it are ignored: cluster.runtime_env={"env_vars": {"WORD": "hostile"}}; --trust-run'
    assert warning in mhmoe(tmp_path, *words).err
    assert "hostile" not in file.read_text()
    assert "ignored" not in mhmoe(tmp_path, *words, "--trust-run").err
    assert "hostile" in file.read_text()


def test_image_without_a_digest_is_a_warning(tmp_path):
    result = mhmoe(tmp_path, "cluster", "render", SITE, "--into", "out")
    assert (result.code, "may become another image; give its digest" in result.err) == (0, True)


def test_mistakes_are_usage_errors(tmp_path):
    (tmp_path / "file").touch()
    for words, message in [
        (("--into", "file"), "--into file: Not a directory; name a folder that you can write to"),
        (("--set", "train.steps=5"), "name one with --run"),
    ]:
        result = mhmoe(tmp_path, "cluster", "render", SITE, *words)
        assert result.code == 2, result
        assert message in " ".join(result.err.split())
    assert_one_line(mhmoe(tmp_path, "cluster", "render", "no.yaml"), 3, "spec no.yaml")
