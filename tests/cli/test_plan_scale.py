"""`mhmoe plan` for a cluster on paper, and the forecast of where a run's workers will be."""

import math
import re
from pathlib import Path

import pytest

from mhmoe_ray.cli import plan_estimate
from mhmoe_ray.cli.plan import as_dict
from mhmoe_ray.cli.plan_placement import placement, placement_on_paper, said_of
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.planner.estimate import estimate
from mhmoe_ray.planner.placement import Node
from mhmoe_ray.planner.resolve import resolve_spec
from tests.cli.run import assert_one_line, mhmoe
from tests.specs import tiny_spec

TRILLION = str(Path(__file__).parents[2] / "jobs/scale/trillion.yaml")


@pytest.fixture
def alone(corpus, tmp_path, monkeypatch):
    """Return the folder with a spec, in an environment without a cluster."""
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return corpus


def on_paper(*overrides):
    """Return the JSON that `plan --nodes 128 --gpus 8 --json` prints with these overrides."""
    spec = resolve_spec(Path(TRILLION), overrides)
    placed = placement_on_paper(spec, 128, 8)
    return {
        **as_dict(spec, placed),
        "estimate": plan_estimate.as_dict(spec, placed.layout, estimate(spec, placed.layout)),
    }


def shown(folder, *overrides, **env):
    words = [word for key in overrides for word in ("--set", key)]
    return mhmoe(folder, "plan", TRILLION, "--nodes", "128", "--gpus", "8", *words, **env).out


def test_a_trillion_parameters_on_a_thousand_gpus(alone):
    plan = mhmoe(alone, "plan", TRILLION, "--nodes", "128", "--gpus", "8", "--json").json()
    assert plan["estimate"] == on_paper()["estimate"]
    assert 0.95e12 < plan["sizes"]["parameters"] < 1.05e12
    assert plan["spec"]["model"]["moe"]["experts"] == 1024
    assert (plan["layout"]["workers"], plan["layout"]["gpus"]) == (1024, 1024)
    placed, found = plan["placement"], plan["estimate"]
    assert placed["node_of_rank"] == [f"node{rank // 8}" for rank in range(1024)]
    assert placed["straddling_groups"] == [0, 1, 2, 3]  # 256 ranks are on 32 nodes
    assert placed["groups_apart"] == []
    assert found["memory"]["fits"]
    assert found["memory"]["needed"] == plan["memory_per_rank"]["total"]
    step = found["step"]
    parts = [part["seconds"] for part in step["parts"]]
    assert step["seconds_in_turn"] == pytest.approx(sum(parts))
    assert max(parts) == step["longest"]["seconds"] < step["seconds_overlapped"] < step["seconds_in_turn"]
    at_peak = plan["tokens_per_step"] * plan["flops_per_token"]["training"] / 1024 / 989e12
    assert step["share_of_peak_flops_in_turn"] == pytest.approx(at_peak / step["seconds_in_turn"])
    assert 0.05 < step["share_of_peak_flops_in_turn"] < step["share_of_peak_flops_overlapped"] < 0.4
    # What leaves a rank is the same by exchange and by link class.
    sent = sum(sum(over.values()) for over in found["traffic_per_rank"].values())
    assert sent == pytest.approx(sum(e["sent_per_step"] for e in plan["exchanges"]), rel=1e-6)


@pytest.mark.parametrize(("ep", "nodes"), [(64, 8), (256, 32)])
def test_hierarchical_dispatch_sends_less_over_slow_links_by_the_exact_ratio(ep, nodes):
    """The ratio divides the other nodes that 8 choices reach, each counted unless all 8 miss it, by those of the 8
    choices that are on other nodes."""
    found = on_paper(f"cluster.ep={ep}")["estimate"]["dispatches"]
    flat, hierarchical = found["flat"]["sent"], found["hierarchical"]["sent"]
    missed = math.prod((1024 - 1024 // nodes - i) / (1024 - i) for i in range(8))
    ratio = (nodes - 1) * (1 - missed) / (8 * (nodes - 1) / nodes)
    # Beside rows of 3,584 values of 2 bytes go 8 choices and gates there, and the gates' gradients back; and counts.
    beside = (8 * 8 + 8 * 4) / (4 * 3584 * 2)
    assert hierarchical["domain"] / flat["domain"] == pytest.approx(ratio * (1 + beside), rel=1e-4)
    assert hierarchical["domain"] < flat["domain"]
    assert hierarchical["node"] > flat["node"]
    assert found["hierarchical"]["seconds"] < found["flat"]["seconds"]


def test_a_group_that_fits_on_a_node_stays_there_and_both_dispatches_are_one(alone):
    plan = on_paper("cluster.ep=8")
    assert plan["placement"]["straddling_groups"] == []
    found = plan["estimate"]["dispatches"]
    assert found["flat"] == found["hierarchical"]
    assert found["flat"]["sent"]["domain"] == found["flat"]["sent"]["between"] == 0
    assert not plan["estimate"]["memory"]["fits"]  # a rank has 128 experts of each layer
    text = shown(alone, "cluster.ep=8")
    for words in ("memory: does not fit", "every group lies on one node", "and 121 more"):
        assert words in text


def test_slower_links_and_accelerators_take_longer_and_say_so():
    slow = on_paper("cluster.network.domain.bandwidth=1e9", "cluster.accelerator.memory=10e9")["estimate"]
    quick = on_paper("cluster.network.share=1", "cluster.accelerator.flops_share=1")["estimate"]
    usual = on_paper()["estimate"]
    seconds = [found["step"]["seconds_in_turn"] for found in (quick, usual, slow)]
    assert seconds[0] < seconds[1] < seconds[2]
    assert slow["step"]["longest"]["bound"] == "links between nodes"
    assert not slow["memory"]["fits"]
    # All in one domain, the links between domains are of no account.
    one, far = "cluster.network.nodes_per_domain=null", "cluster.network.between.bandwidth=1"
    assert on_paper(one)["estimate"] == on_paper(one, far)["estimate"]
    assert on_paper(far)["estimate"]["step"]["longest"]["bound"] == "links between domains"


def test_the_tables_show_what_the_json_has_and_cut_nothing(alone):
    found = on_paper()["estimate"]
    for columns in ("80", "120"):
        text = shown(alone, COLUMNS=columns)
        assert "…" not in text
        assert "not checked on GPUs" in text
        longest = found["step"]["longest"]
        share = longest["seconds"] / found["step"]["seconds_in_turn"]
        assert f"its longest part is {longest['name']} ({share:.0%} of the latter), bound by" in " ".join(text.split())
        assert f"{found['step']['tokens_per_s_in_turn']:,.0f}" in text
        assert f"{found['step']['seconds_in_turn']:,.2f} s" in text
        assert "0-255     32 from node0 to node31, 8 on each; domain0" in text
        assert "hierarchical (this spec)" in text


def test_nodes_that_do_not_fit_the_spec_are_one_line(alone):
    few = mhmoe(alone, "plan", TRILLION, "--nodes", "3", "--gpus", "8")
    assert_one_line(few, 3, "workers (24) must be a multiple of ep (256)")
    half = mhmoe(alone, "plan", TRILLION, "--nodes", "3")
    assert half.code == 2
    assert "--nodes and --gpus" in half.err


def test_what_straddling_would_refuse_is_said_before_anything_starts(alone):
    refuse, why = "cluster.straddling=refuse", "4 of 4 expert-parallel groups would lie on more than one node"
    assert on_paper(refuse)["placement"]["refused"].endswith(f"the run would end at once: {why}")
    assert why in shown(alone, refuse)
    assert on_paper(refuse, "cluster.ep=8")["placement"]["refused"] is None


def test_without_a_cluster_one_node_is_assumed_and_said(alone):
    text = mhmoe(alone, "plan", "spec.yaml").out
    assert "placement, if one node holds all workers: no cluster runs that could be asked" in text
    plan = mhmoe(alone, "plan", "spec.yaml", "--json").json()
    assert plan["placement"]["node_of_rank"] == ["one node"] * 2
    assert plan["estimate"] is None
    away = mhmoe(alone, "submit", "spec.yaml", "--dry-run", "--address", "http://no-such-host.invalid:8265")
    assert away.json()["placement"]["of"].endswith("the cluster could not be asked")
    assert "warning: cluster http://no-such-host.invalid:8265" in away.err


def placed_on(monkeypatch, spec, *free):
    """Return the placement of a spec on cluster nodes that have so many CPUs and GPUs free each."""
    nodes = [Node(f"node{i}", *cpus_gpus) for i, cpus_gpus in enumerate(free)]
    there = Connection("http://cluster:8265", local=False, is_local_machine=False, token=None)
    monkeypatch.setattr("mhmoe_ray.cluster.connect.connect_if_there", lambda _: there)
    monkeypatch.setattr("mhmoe_ray.cluster.nodes.free_nodes", lambda *_: nodes)
    return placement(spec)


def test_an_elastic_run_starts_with_as_many_as_there_is_room_for(monkeypatch):
    cluster = {"workers": {"min": 2, "max": 8}, "ep": 2}
    spec = tiny_spec(cluster=cluster, train={"micro_batches": 8})
    assert spec.worker_counts == [2, 4, 8]
    placed = placed_on(monkeypatch, spec, (3, 0), (3, 0))
    assert len(placed.layout.nodes) == len(placed.places) == 4  # as train/resilience.py, of the five it has room for
    assert placed.missing is None
    said = said_of(placed)
    assert said[0] == ("it would start with 4 of at most 8 workers, for which there is room now, and grow later")
    # The fourth would take the stream's CPU.
    assert len(placed_on(monkeypatch, spec, (4, 0)).places) == 2
    few = placed_on(monkeypatch, spec, (2, 0))
    assert few.layout is None
    assert few.missing.startswith("1 of 2 workers find no place")
    told = as_dict(spec, placed)
    four = as_dict(spec.with_workers(4), placed)
    assert told["exchanges"] == four["exchanges"]


def test_what_is_left_for_the_data_stream_is_told(monkeypatch):
    spec = tiny_spec(cluster={"workers": 2, "cpus_per_worker": 2})
    assert placed_on(monkeypatch, spec, (8, 0)).notes == []
    assert placed_on(monkeypatch, spec, (7, 0)).notes == [
        "workers leave 3 CPUs for the data stream, which is to have 4: they may wait for it"
    ]
    [note] = placed_on(monkeypatch, spec, (4, 0)).notes
    assert note.startswith("workers take every free CPU, and the data stream has none")


def test_hierarchical_dispatch_that_stays_flat_is_told(monkeypatch):
    spec = tiny_spec(cluster={"workers": 4, "ep": 4, "dispatch": "hierarchical"})
    [note] = placed_on(monkeypatch, spec, (3, 0), (1, 0), (0, 4)).notes[:1]
    assert note == (
        "cluster.dispatch is hierarchical, but flat in the only group: nodes have unequally many of the ranks"
    )
    even = placed_on(monkeypatch, spec, (2, 0), (2, 0))
    assert not any("hierarchical" in note for note in even.notes)


@pytest.mark.ray
def test_a_cluster_tells_where_workers_would_be_and_which_find_no_place(corpus, local_cluster):
    request = mhmoe(corpus, "submit", "spec.yaml", "--dry-run", "--address", local_cluster.address).json()
    [node] = request["placement"]["nodes"]
    assert local_cluster.address in request["placement"]["of"]
    assert request["placement"]["node_of_rank"] == [node["name"]] * node["ranks"]
    more = ("--set", "cluster.cpus_per_worker=9")
    many = mhmoe(corpus, "submit", "spec.yaml", "--dry-run", *more)
    assert many.json()["placement"]["missing"].startswith("2 of 2 workers find no place: each takes 9 CPU")
    assert "Ray starts none before all have a place" in many.err
    assert "2 of 2 workers find no place" in mhmoe(corpus, "plan", "spec.yaml", *more).out


def test_a_link_keeps_its_own_defaults_beside_a_key_that_is_given():
    network = tiny_spec(cluster={"network": {"between": {"bandwidth": 25e9}}}).cluster.network
    assert (network.between.per, network.between.bandwidth, network.between.latency) == ("node", 25e9, 20e-6)
    assert (network.node.bandwidth, network.domain.bandwidth) == (450e9, 50e9)


def test_a_cost_says_that_its_node_is_assumed(alone):
    """No cluster reports where these GPUs are, and exchanges would otherwise silently count as within a node."""
    gpus = ("--set", "cluster.gpus_per_worker=1")
    text = " ".join(mhmoe(alone, "plan", "spec.yaml", *gpus).out.split())
    assert "on 2 of them, taken to be on one node, as no cluster tells where (estimated, not checked)" in text


def test_a_single_gpu_exchanges_nothing_and_has_no_table_of_it(alone):
    words = ("--set", "cluster.ep=1", "--nodes", "1", "--gpus", "1")
    text = mhmoe(alone, "plan", "spec.yaml", *words).out
    assert "on paper: one node of 1 GPU\n" in text
    assert "estimated: sent in a step" not in text
    assert "estimated: time of a step" in text


def test_a_plan_tells_what_the_run_costs_in_accelerator_hours(alone):
    found = re.search(
        r"cost +about ([\d,]+) to ([\d,]+) hours of an H200, on 1,024 of them", shown(alone, COLUMNS="200")
    )
    best, worst = (float(hours.replace(",", "")) for hours in found.groups())
    step = on_paper()["estimate"]["step"]
    assert 0 < best < worst
    assert worst / best == pytest.approx(step["seconds_in_turn"] / step["seconds_overlapped"], rel=0.01)
