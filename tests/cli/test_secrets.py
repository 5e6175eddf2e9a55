"""After a session with a cluster's token and clients' keys, none of them is where others may look."""

from pathlib import Path

import httpx
import psutil
import pytest

from mhmoe_ray.cluster import tokens
from mhmoe_ray.cluster.home import home
from tests.cli.conftest import write_spec
from tests.cli.run import mhmoe
from tests.watch import newest

pytestmark = pytest.mark.ray

KEY = "the-key-of-ann-9f3b2c"


def test_no_secret_is_in_a_log_a_run_directory_or_a_command_line(corpus, local_cluster, unused_port):
    write_spec(corpus)
    keys = {"MHMOE_API_KEYS": f"ann:{KEY}", "MHMOE_API_KEY": KEY}
    submitted = mhmoe(corpus, "submit", "spec.yaml", **keys)
    assert submitted.code == 0, submitted.err
    run = newest(corpus)
    said = [submitted]
    try:
        said.append(mhmoe(corpus, "serve", "deploy", run.id, "--set", f"serve.port={unused_port}", **keys))
        assert said[-1].code == 0, said[-1].err
        url, body = f"http://127.0.0.1:{unused_port}/v1/completions", {"prompt": "the moon", "max_tokens": 4}
        for key, status in ((KEY, 200), ("wrong", 401)):
            answer = httpx.post(url, json=body, headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == status
        verbs = ("status", "list", "logs", "serve status", "cluster status", "doctor")
        said += [mhmoe(corpus, *verb.split(), **keys) for verb in verbs]
        running = "\n".join(" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))  # as ps has it
    finally:
        mhmoe(corpus, "serve", "down")
    assert "ServeReplica" in running
    secrets = {"the cluster's token": tokens.own_token().value, "a client's key": KEY}
    folders = [local_cluster.folder, run.path, home()]
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file() and p != tokens.token_file()]
    assert len(files) > 50
    assert any("dashboard" in p.name for p in files)
    for what, secret in secrets.items():
        found = [str(p) for p in files if secret.encode() in _read(p)]
        assert found == [], f"{what} is in {found}"
        assert secret not in running, f"{what} is in a command line"
        assert not [s for s in said if secret in s.out + s.err], f"{what} was printed"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # gone meanwhile
        return b""
