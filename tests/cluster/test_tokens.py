import pytest

from mhmoe_ray.cluster.tokens import make_token, own_token, user_token
from mhmoe_ray.errors import TokenError


@pytest.fixture(autouse=True)
def _no_tokens(tmp_path, monkeypatch):
    """Give each test empty home folders, and an environment that names no token."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path / "home"))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_own_token_is_made_once_and_is_private(tmp_path):
    path = make_token()
    token = own_token()
    assert make_token() == path
    assert own_token() == token
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(token.value) == 64
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert not (tmp_path / ".ray").exists()


def test_repr_of_a_token_hides_its_value():
    make_token()
    assert own_token().value not in repr(own_token())


def test_user_token_is_found_where_ray_looks(tmp_path, monkeypatch):
    assert user_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("from-default\n")
    assert user_token().value == "from-default"
    (tmp_path / "mine").write_text("from-path\nsecond line\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "mine"))
    assert user_token().value == "from-path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", " from-variable ")
    assert user_token().value == "from-variable"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert user_token() is None


def test_file_without_a_token_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(TokenError, match=r"RAY_AUTH_TOKEN_PATH \(.*none\): No such file"):
        user_token()
    (tmp_path / "none").write_text("\n")
    with pytest.raises(TokenError, match="the file is empty"):
        user_token()
