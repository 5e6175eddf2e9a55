"""Tests of `mhmoe plan` for a hypothetical cluster, and of the forecast of a run's placement."""

import json
import math
import re
from pathlib import Path

import pytest

from mhmoe_ray.api.placement import forecast_placement, placement_remarks
from mhmoe_ray.api.plan import placement_figures, plan
from mhmoe_ray.api.spec import load_spec
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.planner.placement import Node
from tests.cli.run import assert_one_line, mhmoe
from tests.support.specs import tiny_spec

SCALE = Path(__file__).parents[2] / "jobs/scale"
TRILLION, QWEN = str(SCALE / "trillion.yaml"), str(SCALE / "qwen3-30b.yaml")


@pytest.fixture
def clusterless_project(corpus, tmp_path, monkeypatch):
    """Return the project folder, with an environment in which commands find no cluster."""
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return corpus


def plan_on_paper(*overrides):
    """Return what `mhmoe plan --nodes 128 --gpus 8 --json` prints for the trillion-parameter spec with overrides.

    The plan is computed in this process, without the command.
    """
    return plan(load_spec(TRILLION, overrides), nodes=128, gpus=8)


def plan_output(folder, *overrides, **env):
    """Return the tables of `mhmoe plan --nodes 128 --gpus 8` for the trillion-parameter spec with overrides."""
    words = [word for key in overrides for word in ("--set", key)]
    return mhmoe(folder, "plan", TRILLION, "--nodes", "128", "--gpus", "8", *words, **env).out


def test_plan_of_a_trillion_parameters_on_1024_gpus(clusterless_project, monkeypatch):
    # The warnings name sources by paths from the current directory.
    monkeypatch.chdir(clusterless_project)
    plan = mhmoe(clusterless_project, "plan", TRILLION, "--nodes", "128", "--gpus", "8", "--json").json()
    assert plan == json.loads(json.dumps(plan_on_paper()))
    assert 0.95e12 < plan["sizes"]["parameters"] < 1.05e12
    assert plan["spec"]["model"]["moe"]["experts"] == 1024
    assert (plan["layout"]["workers"], plan["layout"]["gpus"]) == (1024, 1024)
    placement, step_estimate = plan["placement"], plan["estimate"]
    assert placement["node_of_rank"] == [f"node{rank // 8}" for rank in range(1024)]
    # The 256 ranks of each of the four groups are on 32 nodes.
    assert placement["straddling_groups"] == [0, 1, 2, 3]
    assert placement["groups_apart"] == []
    assert step_estimate["memory"]["fits"]
    assert step_estimate["memory"]["needed"] == plan["memory_per_rank"]["total"]
    step = step_estimate["step"]
    parts = [part["seconds"] for part in step["parts"]]
    assert step["seconds_in_turn"] == pytest.approx(sum(parts))
    assert max(parts) == step["longest"]["seconds"] < step["seconds_overlapped"] < step["seconds_in_turn"]
    at_peak = plan["tokens_per_step"] * plan["flops_per_token"]["training"] / 1024 / 989e12
    assert step["share_of_peak_flops_in_turn"] == pytest.approx(at_peak / step["seconds_in_turn"])
    assert 0.05 < step["share_of_peak_flops_in_turn"] < step["share_of_peak_flops_overlapped"] < 0.4
    # The bytes that a rank sends have the same sum, whether they are added up by exchange or by link class.
    sent_bytes = sum(sum(link_bytes.values()) for link_bytes in step_estimate["traffic_per_rank"].values())
    assert sent_bytes == pytest.approx(sum(e["sent_per_step"] for e in plan["exchanges"]), rel=1e-6)


def test_shape_of_qwen3_30b_fits_on_eight_gpus():
    """Weights, gradients and moments are float32, and nothing is on the host. Without the keys that save memory, the
    model needs more than twice as much."""
    memory = plan(load_spec(QWEN), nodes=1, gpus=8)["memory_per_rank"]
    assert memory["total"] <= 72e9
    assert memory["moments"] == 2 * memory["weights"] == 2 * memory["gradients"]
    moments = plan(load_spec(QWEN, ["train.moment_precision=bfloat16"]), nodes=1, gpus=8)["memory_per_rank"]["moments"]
    assert moments == memory["moments"] / 2
    plain = ["cluster.ep=1", "train.recompute=none", "train.loss_chunk_rows=null", "cluster.gather_precision=float32"]
    assert plan(load_spec(QWEN, plain), nodes=1, gpus=8)["memory_per_rank"]["total"] > 144e9


@pytest.mark.parametrize(("ep", "nodes"), [(64, 8), (256, 32)])
def test_hierarchical_dispatch_sends_less_over_slow_links(ep, nodes):
    """Hierarchical dispatch sends a row once to each other node that has one of its 8 experts.

    Flat dispatch sends the row once to each of these experts.
    """
    dispatches = plan_on_paper(f"cluster.ep={ep}")["estimate"]["dispatches"]
    flat, hierarchical = dispatches["flat"]["sent"], dispatches["hierarchical"]["sent"]
    miss_probability = math.prod((1024 - 1024 // nodes - i) / (1024 - i) for i in range(8))
    ratio = (nodes - 1) * (1 - miss_probability) / (8 * (nodes - 1) / nodes)
    # A row has 3,584 values of 2 bytes and is sent 4 times. A node that gets the row also gets the row's 8 expert ids
    # and gates, and returns the gradients of the gates.
    extra_share = (8 * 8 + 8 * 4) / (4 * 3584 * 2)
    # Flat dispatch on GPUs sends a route's gate and the gradient of it, in float32.
    gate_share = (4 + 4) / (4 * 3584 * 2)
    expected_ratio = ratio * (1 + extra_share) / (1 + gate_share)
    assert hierarchical["domain"] / flat["domain"] == pytest.approx(expected_ratio, rel=1e-4)
    assert hierarchical["domain"] < flat["domain"]
    assert hierarchical["node"] > flat["node"]
    assert dispatches["hierarchical"]["seconds"] < dispatches["flat"]["seconds"]


def test_dispatches_are_equal_if_groups_fit_on_a_node(clusterless_project):
    plan = plan_on_paper("cluster.ep=8")
    assert plan["placement"]["straddling_groups"] == []
    dispatches = plan["estimate"]["dispatches"]
    assert dispatches["flat"] == dispatches["hierarchical"]
    assert dispatches["flat"]["sent"]["domain"] == dispatches["flat"]["sent"]["between"] == 0
    # A rank gathers 128 experts of a layer at a time, and holds a small part of them.
    assert plan["estimate"]["memory"]["fits"]
    text = plan_output(clusterless_project, "cluster.ep=8")
    for words in ("every group lies on one node", "and 121 more"):
        assert words in text


def test_slower_links_and_accelerators_take_longer():
    slow = plan_on_paper("cluster.network.domain.bandwidth=1e9", "cluster.accelerator.memory=10e9")["estimate"]
    quick = plan_on_paper("cluster.network.share=1", "cluster.accelerator.flops_share=1")["estimate"]
    usual = plan_on_paper()["estimate"]
    seconds = [estimate_json["step"]["seconds_in_turn"] for estimate_json in (quick, usual, slow)]
    assert seconds[0] < seconds[1] < seconds[2]
    assert slow["step"]["longest"]["bound"] == "links between nodes"
    assert not slow["memory"]["fits"]
    # If all nodes are in one domain, no link between domains is used, so its bandwidth does not matter.
    one_domain, slow_links = "cluster.network.nodes_per_domain=null", "cluster.network.between.bandwidth=1"
    assert plan_on_paper(one_domain)["estimate"] == plan_on_paper(one_domain, slow_links)["estimate"]
    assert plan_on_paper(slow_links)["estimate"]["step"]["longest"]["bound"] == "links between domains"


def test_tables_show_the_figures_of_the_json_untruncated(clusterless_project):
    estimate_json = plan_on_paper()["estimate"]
    for columns in ("80", "120"):
        text = plan_output(clusterless_project, COLUMNS=columns)
        assert "…" not in text
        assert "not checked on GPUs" in text
        longest = estimate_json["step"]["longest"]
        share = longest["seconds"] / estimate_json["step"]["seconds_in_turn"]
        assert f"its longest part is {longest['name']} ({share:.0%} of the latter), bound by" in " ".join(text.split())
        assert f"{estimate_json['step']['tokens_per_s_in_turn']:,.0f}" in text
        assert f"{estimate_json['step']['seconds_in_turn']:,.2f} s" in text
        assert "0-255     32 from node0 to node31, 8 on each; domain0" in text
        assert "hierarchical (this spec)" in text


def test_nodes_that_do_not_fit_the_spec_are_one_line(clusterless_project):
    too_few_nodes = mhmoe(clusterless_project, "plan", TRILLION, "--nodes", "3", "--gpus", "8")
    assert_one_line(too_few_nodes, 3, "cluster.ep: 256 does not divide 24 GPUs")
    nodes_only = mhmoe(clusterless_project, "plan", TRILLION, "--nodes", "3")
    assert nodes_only.code == 2
    assert "needs both --nodes and --gpus" in nodes_only.err


def test_chosen_values_are_printed_with_the_way_to_keep_them(clusterless_project):
    words = ("--nodes", "1", "--gpus", "8", "--set", "train.micro_batches=2", "--set", "train.micro_batch_size=8")
    lines = mhmoe(clusterless_project, "plan", "spec.yaml", *words).out.splitlines()
    figures = mhmoe(clusterless_project, "plan", "spec.yaml", *words, "--json").json()
    assert figures["chosen"]["train.micro_batches"] == 8
    shown_keys = dict(line.split(": ") for line in lines if re.match(r"(cluster|train)\.\w+: ", line))
    assert {"cluster.workers", "train.micro_batches"} <= shown_keys.keys() <= figures["chosen"].keys()
    assert all(str(figures["chosen"][key]).lower() == value for key, value in shown_keys.items())
    [advice] = [line for line in lines if line.startswith("to keep these values")]
    kept_spec = load_spec(clusterless_project / "spec.yaml", re.findall(r"--set (\S+)", advice))
    assert kept_spec.model_dump(mode="json", exclude={"data", "storage"}) == {
        key: value for key, value in figures["spec"].items() if key not in ("data", "storage")
    }


def test_plan_shows_the_refusal_of_straddling_groups(clusterless_project):
    refuse, reason = "cluster.straddling=refuse", "4 of 4 expert-parallel groups would lie on more than one node"
    assert plan_on_paper(refuse)["placement"]["refused"].endswith(f"the run would end at once: {reason}")
    assert reason in plan_output(clusterless_project, refuse)
    assert plan_on_paper(refuse, "cluster.ep=8")["placement"]["refused"] is None


def test_plan_assumes_one_node_without_a_cluster(clusterless_project):
    text = mhmoe(clusterless_project, "plan", "spec.yaml").out
    assert "placement, if one node holds all workers: no cluster is running" in text
    plan = mhmoe(clusterless_project, "plan", "spec.yaml", "--json").json()
    assert plan["placement"]["node_of_rank"] == ["one node"] * 2
    assert plan["estimate"] is None
    result = mhmoe(
        clusterless_project, "submit", "spec.yaml", "--dry-run", "--address", "http://no-such-host.invalid:8265"
    )
    assert result.json()["placement"]["of"].endswith("the cluster did not answer")
    assert "warning: cluster http://no-such-host.invalid:8265" in result.err


def place_on_nodes(monkeypatch, spec, *free_resources):
    """Return the forecast placement of a spec on a simulated cluster; each node is given as (free CPUs, free GPUs)."""
    nodes = [Node(f"node{i}", *cpus_gpus) for i, cpus_gpus in enumerate(free_resources)]
    connection = Connection("http://cluster:8265", local=False, is_local_machine=False, token=None)
    monkeypatch.setattr("mhmoe_ray.api.placement.connect_if_running", lambda _: connection)
    monkeypatch.setattr("mhmoe_ray.api.placement.free_nodes", lambda *_: nodes)
    return forecast_placement(spec)


def test_elastic_run_starts_with_the_workers_that_fit(monkeypatch):
    cluster = {"workers": {"min": 2, "max": 8}, "ep": 2}
    spec = tiny_spec(cluster=cluster, train={"micro_batches": 8})
    assert spec.worker_counts == [2, 4, 8]
    placement = place_on_nodes(monkeypatch, spec, (3, 0), (3, 0))
    # The nodes have room for five workers and the data stream, so the run starts with 4, the largest allowed number up
    # to 5. DivisorScalingPolicy in train/resilience.py starts the same number.
    assert len(placement.layout.nodes) == len(placement.rank_nodes) == 4
    assert placement.shortage is None
    remarks = placement_remarks(placement)
    assert remarks[0] == ("it would start with 4 of at most 8 workers, as there is room for now, and grow later")
    # With four workers, no CPU of the four would be left for the data stream, so the run starts with two.
    assert len(place_on_nodes(monkeypatch, spec, (4, 0)).rank_nodes) == 2
    small_placement = place_on_nodes(monkeypatch, spec, (2, 0))
    assert small_placement.layout is None
    assert small_placement.shortage.startswith("1 of 2 workers find no place")
    plan_json = placement_figures(spec, placement)
    four_worker_json = placement_figures(spec.with_workers(4), placement)
    assert plan_json["exchanges"] == four_worker_json["exchanges"]


def test_placement_notes_too_few_cpus_for_the_data_stream(monkeypatch):
    spec = tiny_spec(cluster={"workers": 2, "cpus_per_worker": 2})
    assert place_on_nodes(monkeypatch, spec, (8, 0)).notes == []
    assert place_on_nodes(monkeypatch, spec, (7, 0)).notes == [
        "workers leave 3 CPUs for the data stream, which needs 4: they may wait for it"
    ]
    [note] = place_on_nodes(monkeypatch, spec, (4, 0)).notes
    assert note.startswith("workers take every free CPU, and the data stream has none")


def test_placement_notes_hierarchical_dispatch_that_stays_flat(monkeypatch):
    spec = tiny_spec(cluster={"workers": 4, "ep": 4, "dispatch": "hierarchical"})
    [note] = place_on_nodes(monkeypatch, spec, (3, 0), (1, 0), (0, 4)).notes[:1]
    assert note == ("cluster.dispatch is hierarchical, but flat in the only group: nodes have unequal numbers of ranks")
    even_placement = place_on_nodes(monkeypatch, spec, (2, 0), (2, 0))
    assert not any("hierarchical" in note for note in even_placement.notes)


@pytest.mark.ray
def test_dry_run_shows_the_placement_on_a_cluster(corpus, local_cluster):
    request = mhmoe(corpus, "submit", "spec.yaml", "--dry-run", "--address", local_cluster.address).json()
    [node] = request["placement"]["nodes"]
    assert local_cluster.address in request["placement"]["of"]
    assert request["placement"]["node_of_rank"] == [node["name"]] * node["ranks"]
    overrides = ("--set", "cluster.cpus_per_worker=9")
    result = mhmoe(corpus, "submit", "spec.yaml", "--dry-run", *overrides)
    assert result.json()["placement"]["missing"].startswith("2 of 2 workers find no place: each takes 9 CPU")
    assert "Ray starts none before all have a place" in result.err
    assert "2 of 2 workers find no place" in mhmoe(corpus, "plan", "spec.yaml", *overrides).out


def test_link_keeps_its_defaults_beside_a_given_key():
    network = tiny_spec(cluster={"network": {"between": {"bandwidth": 25e9}}}).cluster.network
    assert (network.between.per, network.between.bandwidth, network.between.latency) == ("node", 25e9, 20e-6)
    assert (network.node.bandwidth, network.domain.bandwidth) == (450e9, 50e9)


def test_cost_mentions_the_assumed_node(clusterless_project):
    """Exchanges are estimated as if all GPUs were on one node if there is no cluster, and the user must know that."""
    gpus = ("--set", "cluster.gpus_per_worker=1")
    text = " ".join(mhmoe(clusterless_project, "plan", "spec.yaml", *gpus).out.split())
    assert "on 2 of them, taken to be on one node, as no cluster tells where (estimated, not checked)" in text


def test_single_gpu_has_no_table_of_exchanges(clusterless_project):
    words = ("--set", "cluster.ep=1", "--nodes", "1", "--gpus", "1")
    text = mhmoe(clusterless_project, "plan", "spec.yaml", *words).out
    assert "on paper: one node of 1 GPU\n" in text
    assert "estimated: sent in a step" not in text
    assert "estimated: time of a step" in text


def test_plan_shows_the_cost_in_accelerator_hours(clusterless_project):
    match = re.search(
        r"cost +about ([\d,]+) to ([\d,]+) hours of an H200, on 1,024 of them",
        plan_output(clusterless_project, COLUMNS="200"),
    )
    best, worst = (float(hours.replace(",", "")) for hours in match.groups())
    step = plan_on_paper()["estimate"]["step"]
    assert 0 < best < worst
    assert worst / best == pytest.approx(step["seconds_in_turn"] / step["seconds_overlapped"], rel=0.01)
