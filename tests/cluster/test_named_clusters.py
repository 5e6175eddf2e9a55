import stat

import pytest

from mhmoe_ray.api.attempts import attempt_address
from mhmoe_ray.cluster import connect, tokens
from mhmoe_ray.cluster.connect import (
    _find_named_cluster,
    _resolve_address,
    _token,
    dashboard_command,
    uses_local_cluster,
)
from mhmoe_ray.cluster.tokens import state_folder
from mhmoe_ray.errors import ClusterError, TokenError
from mhmoe_ray.runs.directory import Attempt
from tests.cli.run import assert_one_line, mhmoe


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """Give each test empty home folders, and an environment that names no cluster."""
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)


def test_chosen_cluster_is_used_unless_another_is_named(monkeypatch):
    assert uses_local_cluster(None)
    connect.use("lab", "http://head:8265")
    connect.use("other", "http://other:8265")
    assert _resolve_address(None) == "http://other:8265"
    assert _resolve_address("lab") == "http://head:8265"
    assert _resolve_address("http://third:8265") == "http://third:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://third:8265")
    assert _resolve_address(None) == "http://third:8265"
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    assert connect.use("lab").address == "http://head:8265"
    assert _resolve_address(None) == "http://head:8265"
    assert connect.use("local") is None
    assert uses_local_cluster(None)
    assert _resolve_address("other") == "http://other:8265"


def test_run_stays_on_its_cluster_after_another_is_chosen(monkeypatch):
    connect.use("lab", "http://head:8265")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://third:8265")
    assert uses_local_cluster(attempt_address(Attempt("job", "http://127.0.0.1:23456", local=True)))
    assert _resolve_address(attempt_address(Attempt("job", "http://other:8265", local=False))) == "http://other:8265"


def test_command_of_a_dashboard_names_the_address_of_other_clusters_than_the_default():
    address = "http://head:8265"
    assert dashboard_command(address) == f"mhmoe cluster dashboard --address {address}"
    connect.use("lab", address)
    assert dashboard_command(address) == "mhmoe cluster dashboard"
    connect.use("other", "http://other:8265")
    assert dashboard_command(address) == f"mhmoe cluster dashboard --address {address}"


def test_forgotten_cluster_is_unknown_and_no_longer_chosen():
    connect.use("lab", "http://head:8265")
    connect.forget("lab")
    assert connect.read_named_clusters() == connect.NamedClusters("local", {})
    for call in (lambda: connect.forget("lab"), lambda: connect.use("lab")):
        with pytest.raises(ClusterError, match="there is no cluster of this name"):
            call()


def test_token_of_a_named_cluster_is_used_only_for_its_address(tmp_path):
    file = tmp_path / "token"
    file.write_text("secret\n")
    connect.use("lab", "http://head:8265", file)
    connect.use("other", "http://other:8265")
    assert _token("http://head:8265", None).value == "secret"
    assert _token("http://other:8265", None) is tokens.user_token() is None
    file.unlink()
    with pytest.raises(TokenError, match="mhmoe cluster use"):
        _token("http://head:8265", None)


def test_named_clusters_with_one_address_have_their_own_tokens(tmp_path):
    tunnel = "http://127.0.0.1:8265"
    for name in ("lab", "prod"):
        (tmp_path / name).write_text(name)
        connect.use(name, tunnel, tmp_path / name)
    connect.use("bare", tunnel)
    connect.use("prod")
    assert _token(tunnel, _find_named_cluster("lab")).value == "lab"
    assert _token(tunnel, _find_named_cluster(None)).value == "prod"
    # A run records only the address, so of the clusters with this address the current one is taken.
    assert _token(tunnel, _find_named_cluster(tunnel)).value == "prod"
    assert _token(tunnel, _find_named_cluster("bare")) is tokens.user_token()


def test_file_of_named_clusters_is_private_and_has_no_token(tmp_path):
    (tmp_path / "token").write_text("secret")
    connect.use("lab", "http://head:8265", tmp_path / "token")
    path = state_folder() / connect.FILE
    assert "secret" not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["", "Lab", "a b", "../x", "1x", "x" * 60])
def test_invalid_cluster_names_are_refused(name):
    with pytest.raises(ClusterError, match="the name is not allowed"):
        connect.use(name, "http://head:8265")


def test_reserved_name_and_damaged_file_are_errors():
    with pytest.raises(ClusterError, match="choose another name"):
        connect.use("local", "http://head:8265")
    connect.use("lab", "http://head:8265")
    (state_folder() / connect.FILE).write_text("{")
    with pytest.raises(ClusterError, match="it is damaged"):
        connect.read_named_clusters()


def test_commands_choose_list_and_forget_clusters(tmp_path):
    (tmp_path / "token").write_text("secret")
    use = ("cluster", "use", "lab", "--address", "http://head:8265/", "--token-file", str(tmp_path / "token"))
    assert mhmoe(tmp_path, *use).out == "commands now use lab, http://head:8265\n"
    result = mhmoe(tmp_path, "cluster", "list", "--json")
    lab = {"name": "lab", "address": "http://head:8265", "token_file": str(tmp_path / "token")}
    assert result.json() == {"current": "lab", "known": {"lab": lab}}
    assert "secret" not in result.out
    local, current = mhmoe(tmp_path, "cluster", "list", COLUMNS="40").out.splitlines()[1:]
    assert local.split()[0] == "local"
    assert current.split() == ["*", "lab", "http://head:8265", str(tmp_path / "token")]
    assert mhmoe(tmp_path, "cluster", "use", "local").out == "commands now use local, the cluster on this machine\n"
    assert mhmoe(tmp_path, "cluster", "forget", "lab").out == "lab is forgotten\n"
    assert_one_line(mhmoe(tmp_path, "cluster", "use", "lab"), 5, "there is no cluster of this name")
