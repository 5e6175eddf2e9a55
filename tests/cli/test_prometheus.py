"""A real Prometheus beside a run and a server: every panel of every dashboard has data."""

import itertools
import json
import shutil
import subprocess

import httpx
import pytest
import yaml

from mhmoe_ray.render.monitoring import DASHBOARDS, WINDOW, prometheus
from tests.cli.conftest import write_spec
from tests.cli.run import mhmoe
from tests.watch import newest, step_of, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.system]


@pytest.fixture(scope="module")
def trained_and_served(corpus, local_cluster):
    """Start a run that goes on, and serve the checkpoint of another run; yield the run and the server's port."""
    longer = {"seq_len": 256, "prepared": "longer"}  # than a piece of the cache
    write_spec(corpus, data=longer)
    done = mhmoe(corpus, "submit", "spec.yaml")
    assert done.code == 0, done.err
    served = newest(corpus)
    port = 18473
    deployed = mhmoe(corpus, "serve", "deploy", served.id, "--set", f"serve.port={port}")
    assert deployed.code == 0, deployed.err
    write_spec(corpus, data=longer, train={"steps": 100_000, "validate_every": 10})
    assert mhmoe(corpus, "submit", "spec.yaml", "--detach").code == 0
    run = newest(corpus)
    wait_until(lambda: step_of(run) >= 20, "step 20")
    yield run, port
    mhmoe(corpus, "stop", run.id, "--now")
    mhmoe(corpus, "serve", "down")


@pytest.fixture(scope="module")
def url(tmp_path_factory, local_cluster):
    if not shutil.which("prometheus"):
        pytest.skip("needs prometheus, Debian's package of that name")
    folder = tmp_path_factory.mktemp("prometheus")
    config = folder / "prometheus.yml"
    rendered = prometheus(str(local_cluster.ray_folder))
    config.write_text(yaml.safe_dump(rendered))
    subprocess.run(["promtool", "check", "config", config], check=True, capture_output=True)
    listen = "127.0.0.1:19473"
    arguments = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={listen}"]
    log = (folder / "log").open("w")
    process = subprocess.Popen(["prometheus", *arguments], stdout=log, stderr=log)
    wait_until(lambda: _is_ready(f"http://{listen}"), "Prometheus")
    yield f"http://{listen}"
    process.terminate()
    process.wait()
    log.close()


def _is_ready(url):
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def values(url, query):
    """Return the current values of the query's series, each with its labels."""
    for variable in ("$run", "$model"):
        query = query.replace(variable, ".*")
    answer = httpx.get(f"{url}/api/v1/query", params={"query": query.replace(WINDOW, "1m")}).json()
    assert answer["status"] == "success", answer
    return [(s["metric"], float(s["value"][1])) for s in answer["data"]["result"] if s["value"][1] != "NaN"]


def test_every_panel_has_data(trained_and_served, url):
    run, port = trained_and_served
    panels = [(p.title, q) for of in DASHBOARDS for p in of.panels if not p.gpu for q in p.queries.values()]
    asked = itertools.count()

    def missing():
        # Long enough to fill a piece of the cache, which the next such prompt finds there.
        body = {"prompt": [1 + next(asked) % 3, *range(2, 200)], "max_tokens": 8}
        assert httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60).status_code == 200
        return [title for title, query in panels if not values(url, query)]

    try:
        wait_until(lambda: not missing(), "data in every panel", 120)
    except AssertionError:
        pytest.fail(f"no data in: {missing()}")
    [(labels, _)] = values(url, f'ray_mhmoe_train_loss{{run="{run.id}"}}')
    assert labels["run"] == run.id
    assert {labels["rank"] for labels, _ in values(url, "ray_mhmoe_train_data_wait")} == {"0", "1"}


def test_what_grafana_imports_asks_for_the_same():
    from mhmoe_ray.render.monitoring import dashboard

    for of in DASHBOARDS:
        found = json.loads(json.dumps(dashboard(of)))
        asked = [t["expr"] for p in found["panels"] for t in p["targets"]]
        assert asked == [q for p in of.panels for q in p.queries.values()]
        assert [v["name"] for v in found["templating"]["list"]] == ["datasource", of.label]
