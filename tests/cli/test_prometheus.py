"""Test that every panel of the dashboards has data, with a real Prometheus, runs and a server."""

import itertools
import json
import shutil
import subprocess

import httpx
import pytest
import yaml

from mhmoe_ray.cluster.spawn import free_ports
from mhmoe_ray.render.monitoring import DASHBOARDS, RATE_WINDOW, prometheus_config
from tests.cli.conftest import write_spec
from tests.cli.run import mhmoe
from tests.data.scenes import write_class_folders, write_coco_folder
from tests.support import vision_specs
from tests.support.watch import newest_run, step_of, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.system]


@pytest.fixture(scope="module")
def trained_and_served(corpus, local_cluster):
    """Start a long run, and serve the checkpoint of another run; yield the long run and the server's port."""
    # Sequences are longer than a block of the cache, so that a prompt can fill a block and be found in the cache again.
    data = {"seq_len": 256, "prepared": "longer"}
    write_spec(corpus, data=data)
    result = mhmoe(corpus, "submit", "spec.yaml")
    assert result.code == 0, result.err
    served_run = newest_run(corpus)
    port = 18473
    deploy_result = mhmoe(corpus, "serve", "deploy", served_run.id, "--set", f"serve.port={port}")
    assert deploy_result.code == 0, deploy_result.err
    write_spec(corpus, data=data, train={"steps": 100_000, "validate_every": 10})
    assert mhmoe(corpus, "submit", "spec.yaml", "--detach").code == 0
    run = newest_run(corpus)
    wait_until(lambda: step_of(run) >= 20, "step 20")
    yield run, port
    mhmoe(corpus, "stop", run.id, "--now")
    mhmoe(corpus, "serve", "down")


@pytest.fixture
def vision_run(tmp_path, local_cluster):
    """Start a long run of a vision model, whose metrics have parts and adaptive tasks; yield the run, and then stop it.

    It ends with its test, so that its CPUs are free for the runs of `trained_and_served`.
    """
    write_class_folders(tmp_path / "raw" / "classes", 60)
    write_coco_folder(tmp_path / "raw" / "scenes", 50)
    vision_specs.write_spec(tmp_path, 2, train={"steps": 100_000})
    assert mhmoe(tmp_path, "submit", "spec.yaml", "--detach").code == 0
    run = newest_run(tmp_path)
    wait_until(lambda: step_of(run) >= 10, "step 10")
    yield run
    mhmoe(tmp_path, "stop", run.id, "--now")


@pytest.fixture(scope="module")
def url(tmp_path_factory, local_cluster):
    """Run a Prometheus that scrapes the local cluster, and yield its URL; skip the tests where it is not installed."""
    if not shutil.which("prometheus"):
        pytest.skip("needs prometheus, Debian's package of that name")
    folder = tmp_path_factory.mktemp("prometheus")
    config = folder / "prometheus.yml"
    rendered = prometheus_config(str(local_cluster.ray_folder))
    config.write_text(yaml.safe_dump(rendered))
    subprocess.run(["promtool", "check", "config", config], check=True, capture_output=True)
    listen = f"127.0.0.1:{free_ports(1)[0]}"
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


def query_values(url, query):
    """Return the labels and the current value of each series of a dashboard's query, for all runs and models.

    Series without a number are left out.
    """
    for variable in ("$run", "$model"):
        query = query.replace(variable, ".*")
    answer = httpx.get(f"{url}/api/v1/query", params={"query": query.replace(RATE_WINDOW, "1m")}).json()
    assert answer["status"] == "success", answer
    return [(s["metric"], float(s["value"][1])) for s in answer["data"]["result"] if s["value"][1] != "NaN"]


def panel_queries(of_parts):
    """Return the title and the query of each panel without a GPU, about parts of micro-batches or about all else."""
    return [
        (panel.title, query)
        for dashboard in DASHBOARDS
        for panel in dashboard.panels
        for legend, query in panel.queries.items()
        if not panel.needs_gpu and ("{{part}}" in legend) == of_parts
    ]


def wait_for_data(url, queries, generate_data=lambda: None):
    """Wait until each query has a value; `generate_data` is called before each attempt."""

    def empty_panels():
        generate_data()
        return [title for title, query in queries if not query_values(url, query)]

    try:
        wait_until(lambda: not empty_panels(), "data in every panel", 120)
    except AssertionError:
        pytest.fail(f"no data in: {empty_panels()}")


def test_panels_of_parts_have_data(vision_run, url):
    queries = panel_queries(of_parts=True)
    assert len(queries) == 3
    wait_for_data(url, queries)


def test_all_other_panels_have_data(trained_and_served, url):
    run, port = trained_and_served
    request_count = itertools.count()

    def send_request():
        # The prompt fills a block of the cache, so that the next prompt with the same first token is a cache hit.
        body = {"prompt": [1 + next(request_count) % 3, *range(2, 200)], "max_tokens": 8}
        assert httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60).status_code == 200

    wait_for_data(url, panel_queries(of_parts=False), send_request)
    [(labels, _)] = query_values(url, f'ray_mhmoe_train_loss{{run="{run.id}"}}')
    assert labels["run"] == run.id
    assert {labels["rank"] for labels, _ in query_values(url, "ray_mhmoe_train_data_wait")} == {"0", "1"}


def test_grafana_dashboards_have_the_same_queries():
    from mhmoe_ray.render.monitoring import dashboard_json

    for source in DASHBOARDS:
        rendered = json.loads(json.dumps(dashboard_json(source)))
        queries = [t["expr"] for p in rendered["panels"] for t in p["targets"]]
        assert queries == [q for p in source.panels for q in p.queries.values()]
        assert [v["name"] for v in rendered["templating"]["list"]] == ["datasource", source.label]
