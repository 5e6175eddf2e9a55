import re
import time

import pytest
import typer

from mhmoe_ray.cli.output import detach_on_interrupt
from mhmoe_ray.cluster import dashboard
from mhmoe_ray.cluster.dashboard import RetryingCaller
from mhmoe_ray.errors import ClusterError, StorageError, TokenError


def _raise(error=ClusterError):
    """Raise an error of this class, as a request that gets no answer does."""
    raise error("cluster x", "no answer in time", "check it")


def test_missing_answers_are_announced_once_and_raised_after_the_timeout(monkeypatch):
    messages = []
    caller = RetryingCaller(messages.append)
    assert [caller.call(_raise, "default") for _ in range(3)] == ["default"] * 3
    assert messages == ["still following, but cluster x: no answer in time; check it"]
    assert caller.call(lambda: "answer", "default") == "answer"
    monkeypatch.setattr(dashboard, "SECONDS", 0.01)
    assert caller.call(_raise, None) is None
    assert len(messages) == 2
    time.sleep(0.02)
    with pytest.raises(ClusterError):
        caller.call(_raise, None)


def test_an_endless_caller_has_no_timeout(monkeypatch):
    monkeypatch.setattr(dashboard, "SECONDS", 0.0)
    caller = RetryingCaller(print, is_endless=True)
    assert [caller.call(_raise, "default") for _ in range(3)] == ["default"] * 3


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(5, "Input/output error"), "storage: [Errno 5] Input/output error; repair it"),
        (StorageError("storage x", "Input/output error", "check it"), "storage x: Input/output error; check it"),
    ],
)
def test_storage_errors_are_tolerated_until_the_timeout(monkeypatch, error, text):
    messages = []
    caller = RetryingCaller(messages.append)

    def read():
        raise error

    assert caller.call(read, "default") == "default"
    assert messages == [f"still following, but {error}"]
    monkeypatch.setattr(dashboard, "SECONDS", 0.0)
    with pytest.raises(StorageError, match=re.escape(text)):
        caller.call(read, None)


def test_a_refused_token_is_raised_at_once():
    with pytest.raises(TokenError):
        RetryingCaller(print).call(lambda: _raise(TokenError), None)


def test_ctrl_c_detaches_with_exit_code_0_and_a_hint(capsys):
    with pytest.raises(typer.Exit) as exit_request, detach_on_interrupt("job x goes on"):
        raise KeyboardInterrupt
    assert exit_request.value.exit_code == 0
    assert "detached; job x goes on" in capsys.readouterr().err
