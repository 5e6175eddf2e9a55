import time

import pytest
import typer

from mhmoe_ray.cli.common import detaching
from mhmoe_ray.cluster import dashboard
from mhmoe_ray.cluster.dashboard import Patience
from mhmoe_ray.errors import ClusterError, StorageError, TokenError


def _raise(error=ClusterError):
    raise error("cluster x", "no answer in time", "check it")


def test_late_answers_are_waited_for_and_said_once_and_a_cluster_that_is_gone_is_not(monkeypatch):
    said = []
    asking = Patience(said.append)
    assert [asking.ask(_raise, "meanwhile") for _ in range(3)] == ["meanwhile"] * 3
    assert said == ["still following, but cluster x: no answer in time; check it"]
    assert asking.ask(lambda: "answer", "meanwhile") == "answer"
    monkeypatch.setattr(dashboard, "SECONDS", 0.01)
    assert asking.ask(_raise, None) is None
    assert len(said) == 2
    time.sleep(0.02)
    with pytest.raises(ClusterError):
        asking.ask(_raise, None)


def test_who_may_not_give_up_waits_for_ever(monkeypatch):
    monkeypatch.setattr(dashboard, "SECONDS", 0.0)
    asking = Patience(print, for_ever=True)
    assert [asking.ask(_raise, "meanwhile") for _ in range(3)] == ["meanwhile"] * 3


def test_a_storage_that_does_not_answer_is_waited_for_too(monkeypatch):
    said = []
    asking = Patience(said.append)

    def read():
        raise OSError(5, "Input/output error")

    assert asking.ask(read, "meanwhile") == "meanwhile"
    assert said == ["still following, but [Errno 5] Input/output error"]
    monkeypatch.setattr(dashboard, "SECONDS", 0.0)
    with pytest.raises(StorageError, match=r"storage: \[Errno 5\] Input/output error; mend it"):
        asking.ask(read, None)


def test_a_token_that_is_refused_is_no_late_answer():
    with pytest.raises(TokenError):
        Patience(print).ask(lambda: _raise(TokenError), None)


def test_who_stops_following_is_told_what_goes_on(capsys):
    with pytest.raises(typer.Exit) as ended, detaching("job x goes on"):
        raise KeyboardInterrupt
    assert ended.value.exit_code == 0
    assert "detached; job x goes on" in capsys.readouterr().err
