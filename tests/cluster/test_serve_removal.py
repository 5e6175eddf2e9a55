"""Removal from Ray Serve: replicas end the requests that they have begun, and nobody waits for those that have not
begun to answer."""

import threading
from concurrent.futures import ThreadPoolExecutor, as_completed

import pytest
import requests

from mhmoe_ray.cluster import serve_client, serve_removal, serving
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.cluster.serve_removal import remove
from mhmoe_ray.errors import ServeError
from tests.cluster.applications import HOST, answering, application_details, ask, building, echo, is_free, states
from tests.watch import LIMIT, wait_until


def test_a_removal_that_has_begun_is_waited_for_unless_it_is_deployed_anew(monkeypatch):
    """Serve reports no deployments of an application that it is deleting."""
    monkeypatch.setattr(serve_removal, "REPORT_SECONDS", 0)
    answer, lines = building(""), []
    answer["applications"] |= {
        "b": answer["applications"]["a"],
        "a": {**answer["applications"]["a"], "status": "DELETING"},
    }
    board = {"/api/serve/applications/": answer}
    with answering(board) as (port, _):

        def say(line):
            lines.append(line)
            board["/api/serve/applications/"] = None if len(lines) == 1 else answer
            if len(lines) == 3:
                answer["applications"].pop("a", None)

        connection = Connection(f"http://{HOST}:{port}", False, True, None)
        remove(connection, "a", say)
        assert [line.split(",")[0] for line in lines] == [
            "application a finishes its requests",
            "still following",
            "application a finishes its requests",
        ]
        with pytest.raises(ServeError, match="application a: there is no such application"):
            remove(connection, "a")
        answer["applications"]["a"] = {**answer["applications"]["b"], "status": "DELETING"}
        with pytest.raises(ServeError, match="application a: it was deployed again meanwhile"):
            remove(connection, "a", lambda line: answer["applications"]["a"].update(status="DEPLOYING"))


def test_an_application_of_a_program_is_left_to_it():
    answer = building("")
    answer["applications"]["a"] |= {"source": "imperative", "deployed_app_config": None}
    message = "application a: a program deployed it by serve.run"
    with answering({"/api/serve/applications/": answer}) as (port, _), pytest.raises(ServeError, match=message):
        remove(Connection(f"http://{HOST}:{port}", False, True, None), "a")


@pytest.mark.ray
def test_what_answers_ends_its_requests_and_what_starts_is_not_waited_for(connection, port, tmp_path, monkeypatch):
    """Serve's own rules would keep a replica for which there is no room for its deployment's hour."""
    monkeypatch.setattr(serve_removal, "CANCEL_SECONDS", 2 * LIMIT)
    two = {"name": "Echo", "num_replicas": 2, "graceful_shutdown_timeout_s": 3600}
    two |= {"ray_actor_options": {"num_cpus": 5}}  # of 8
    begin_file, end_file, answers = tmp_path / "began", tmp_path / "until", []
    url = f"http://{HOST}:{port}/a?began={begin_file}&until={end_file}"
    serving.deploy(connection, {**echo("a", "x"), "deployments": [two]}, HOST, port)
    try:
        wait_until(lambda: states(connection, "a") == ["RUNNING", "STARTING"], "one replica of two")
        wait_until(lambda: ask(port, "a").text == "x", "an answer")
        asking = threading.Thread(target=lambda: answers.append(requests.get(url, timeout=LIMIT).text))
        asking.start()
        wait_until(begin_file.exists, "a request under way")
        removing = threading.Thread(target=remove, args=(connection, "a"), daemon=True)
        removing.start()
        wait_until(lambda: application_details(connection, "a")["status"] == "DELETING", "its removal")
        end_file.touch()
        asking.join(LIMIT)
        assert answers == ["x"]
        removing.join(LIMIT)
        assert not removing.is_alive()
    finally:
        end_file.touch()
    assert serving.applications(connection) == []
    wait_until(lambda: is_free(port), "nobody listens there any more")


@pytest.mark.ray
def test_two_removals_of_an_update_that_has_no_room_end_at_once_and_well(connection, port, monkeypatch):
    """All replicas of the previous version run.

    Serve's own rules would keep the replica that starts for its deployment's hour.
    """
    monkeypatch.setattr(serve_removal, "CANCEL_SECONDS", 2 * LIMIT)
    app = echo("a", "x")

    def deploy(cpus):
        options = {"name": "Echo", "graceful_shutdown_timeout_s": 3600, "max_surge_percent": 100}
        serving.deploy(
            connection, {**app, "deployments": [{**options, "ray_actor_options": {"num_cpus": cpus}}]}, HOST, port
        )

    deploy(0.1)
    serving.wait_until_running(connection, "a")
    deploy(100)
    wait_until(lambda: states(connection, "a") == ["RUNNING", "STARTING"], "one of the update")
    with ThreadPoolExecutor(2) as pool:
        for removal in as_completed([pool.submit(remove, connection, "a") for _ in range(2)], LIMIT):
            failed = removal.exception()  # where the other is ready first
            assert failed is None or (
                isinstance(failed, ServeError) and failed.reason == "there is no such application"
            )
    assert serving.applications(connection) == []


@pytest.mark.ray
def test_what_is_still_built_is_not_waited_for_either(connection, port, tmp_path, monkeypatch):
    """The replica starts at the worst moment: just after Serve has reported that there is none."""
    gate = tmp_path / "gate"
    nowhere = {"name": "Echo", "graceful_shutdown_timeout_s": 3600, "ray_actor_options": {"num_cpus": 100}}
    app = echo("a", "x")
    app["args"]["gate"] = str(gate)
    serving.deploy(connection, {**app, "deployments": [nowhere]}, HOST, port)
    assert states(connection, "a") == []

    def get_before_it_starts(*args):
        details = serve_client.serve_details(*args)
        if not gate.exists():
            gate.touch()
            wait_until(lambda: states(connection, "a") == ["STARTING"], "a replica without room")
        return details

    monkeypatch.setattr(serve_removal, "CANCEL_SECONDS", 2 * LIMIT)
    monkeypatch.setattr(serve_removal, "serve_details", get_before_it_starts)
    removing = threading.Thread(target=remove, args=(connection, "a"), daemon=True)
    removing.start()
    removing.join(LIMIT)
    assert not removing.is_alive()
    assert serving.applications(connection) == []
