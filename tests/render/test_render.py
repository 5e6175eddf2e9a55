"""Tests that the files rendered for a site match the schemas of the programs that read them, and our planner."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from copy import deepcopy
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import yaml

from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.placement import hypothetical_nodes, pack_workers
from mhmoe_ray.render import kuberay, ray_up
from mhmoe_ray.render.files import count_worker_nodes, render_files, secret_advice
from mhmoe_ray.serving.config import ENVIRONMENT, application_config
from mhmoe_ray.spec import ServeSpec, load_resolved_spec, load_site, validate_section
from mhmoe_ray.spec.site import SiteSpec
from mhmoe_ray.storage import location
from tests.data.shards.manifests import make_manifest
from tests.support.specs import tiny_spec

ROOT = Path(__file__).parents[2]
SITE = load_site(ROOT / "cluster/site.yaml")
PROJECTS = ("kuberay", "kueue", "prometheus")
SCHEMAS = {name: json.loads((Path(__file__).parent / f"{name}.json").read_text()) for name in PROJECTS}
MOUNT = Path(SITE.storage.mount)


def run_spec(folder=MOUNT, **sections):
    """Return a tiny spec with paths below `folder`, by default in the storage that the nodes of the site share."""
    return tiny_spec(folder, **{**sections, "cluster": {"shared_filesystem": True, **sections.get("cluster", {})}})


def closed_schema(schema):
    """Return a copy of a JSON schema that does not allow unknown keys, which Kubernetes would drop silently."""
    if isinstance(schema, dict):
        result = {key: closed_schema(value) for key, value in schema.items()}
        if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
            result["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
        return result
    return [closed_schema(item) for item in schema] if isinstance(schema, list) else schema


@cache
def validator(kind):
    """Return the validator of manifests of this kind."""
    [schemas] = [schemas for schemas in SCHEMAS.values() if kind in schemas]
    schema = closed_schema(schemas[kind]) | {"definitions": closed_schema(schemas["definitions"])}
    # The schema leaves out the metadata, whose form Kubernetes defines.
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft7Validator(schema)


def schema_errors(manifest):
    """Return the paths in a manifest that do not match the schema of its kind."""
    return [error.json_path for error in validator(manifest["kind"]).iter_errors(manifest)]


@cache
def manifests():
    """Return a rendered manifest of each kind of custom resources and of some variants, by descriptive names."""
    application = application_config(
        "tiny", MOUNT / "runs/tiny-abcdef/checkpoints/step_00000020.1", ServeSpec(), "tiny"
    )
    bare = SITE.model_copy(update={"redis": None, "redis_secret": None})
    labelled = SITE.workers.model_copy(update={"labels": {"rack": "r1"}})
    queued = queued_site()
    queue_objects = yaml.safe_load(render_files(queued)["kuberay/kueue.yaml"])["items"]
    return {
        "RayCluster": kuberay.ray_cluster(SITE),
        "RayCluster without redis": kuberay.ray_cluster(bare),
        "RayCluster with labels": kuberay.ray_cluster(SITE.model_copy(update={"workers": labelled})),
        "RayCluster with a secret": kuberay.ray_cluster(SITE.model_copy(update={"store_secret": "keys"})),
        "RayCluster with an account": kuberay.ray_cluster(SITE.model_copy(update={"service_account": "trainer"})),
        "RayJob": kuberay.ray_job(SITE, "tiny"),
        "RayService": kuberay.ray_service(SITE, application),
        "RayCluster in a queue": kuberay.ray_cluster(queued),
        "RayJob in a queue": kuberay.ray_job(queued, "tiny"),
        "RayService in a queue": kuberay.ray_service(queued, application),
        "PodMonitor": yaml.safe_load(render_files(SITE)["kuberay/podmonitor.yaml"]),
        **{item["kind"]: item for item in queue_objects},
    }


def queued_site(**changes):
    """Return a site in a queue of Kueue, whose workers have RDMA and run on machines of their own."""
    site_tree = SITE.model_dump(mode="json")
    site_tree["workers"]["pod"] = {
        "node_selector": {"pool": "h100"},
        "tolerations": [{"key": "team", "value": "a", "effect": "NoExecute", "tolerationSeconds": 60}],
        "annotations": {"k8s.v1.cni.cncf.io/networks": '[{"name": "ib"}]'},
        "devices": {"rdma/ib": 8},
        "environment": {"NCCL_IB_HCA": "mlx5"},
    }
    site_tree["kueue"] = {"queue": "training", "priority": "high", "priorities": {"high": 1000, "low": -1}}
    return validate_section(SiteSpec, {**site_tree, **changes}, "site")


@pytest.mark.parametrize("name", manifests())
def test_manifests_match_the_schemas_of_their_operators(name):
    assert schema_errors(manifests()[name]) == []


def ray_groups(manifest):
    """Return the groups of equal pods of a manifest of KubeRay: the head, data nodes and workers."""
    spec = manifest["spec"]
    spec = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return spec["headGroupSpec"], *spec["workerGroupSpecs"]


def pod_specs(manifest):
    """Return the specifications of all pods of a manifest of KubeRay."""
    submitter = manifest["spec"].get("submitterPodTemplate")
    return [group["template"]["spec"] for group in ray_groups(manifest)] + ([submitter["spec"]] if submitter else [])


@pytest.mark.parametrize(
    ("keys", "pod_fields", "advice"),
    [
        (
            {"store_secret": "keys"},
            ([{"secretRef": {"name": "keys"}}], None),
            "secret generic keys --namespace default",
        ),
        ({"service_account": "trainer"}, (None, "trainer"), "as service account trainer"),
        ({}, (None, None), "warning: pods get no credentials for s3://; set store_secret or service_account"),
    ],
)
def test_pods_get_access_to_object_stores_where_a_run_uses_one(s3, keys, pod_fields, advice):
    site, folder = SITE.model_copy(update=keys), "s3://bucket/folder"
    for root, expected in ((MOUNT, (None, None)), (location(f"{folder}?{s3[0]}"), pod_fields)):
        run = run_spec(root)
        application = application_config("tiny", root / "step_00000020.1", ServeSpec(), "tiny")
        files = render_files(site, run, application)
        for name in ("rayjob-tiny", "rayservice-tiny"):
            for pod in pod_specs(yaml.safe_load(files[f"kuberay/{name}.yaml"]))[:3]:
                assert (pod["containers"][0].get("envFrom"), pod.get("serviceAccountName")) == expected
                # Without file paths, nodes need no shared storage.
                assert ("storage" in [volume["name"] for volume in pod["volumes"]]) == (root == MOUNT)
                assert ("store-secret" in [volume["name"] for volume in pod["volumes"]]) == bool(expected[0])
        [head, *_] = pod_specs(yaml.safe_load(files["kuberay/raycluster.yaml"]))
        assert head.get("serviceAccountName") == pod_fields[1]
    assert list(secret_advice(site, run_spec(), None)) == []
    for run_or_none, application_or_none in ((run, None), (None, application)):
        [found_advice] = secret_advice(site, run_or_none, application_or_none)
        assert advice in found_advice


@pytest.mark.parametrize("tracking", [{}, {"wandb": "offline"}, {"wandb": "online"}, {"mlflow": "http://m:5000"}])
@pytest.mark.parametrize("secret", [None, "trackers"])
def test_pods_get_the_credentials_of_trackers_where_a_run_uses_one(tracking, secret):
    site, run = SITE.model_copy(update={"tracker_secret": secret}), run_spec(tracking=tracking)
    needs_secret = tracking not in ({}, {"wandb": "offline"})
    [pod, *_] = pod_specs(yaml.safe_load(render_files(site, run)["kuberay/rayjob-tiny.yaml"]))
    expected = [{"secretRef": {"name": secret}}] if needs_secret and secret else None
    assert pod["containers"][0].get("envFrom") == expected
    advice = "".join(secret_advice(site, run, None))
    assert ("create secret generic trackers" in advice) == bool(expected)
    assert ("warning: pods get no WANDB_API_KEY" in advice) == (secret is None and tracking == {"wandb": "online"})


MUTATIONS = {
    "RayCluster": {
        "authOptions.mode": "open",
        "headGroupSpec.templates": {},
        "workerGroupSpecs.1.minReplicas": "two",
    },
    "RayJob": {
        "backoffLimit": "three",
        "shutdownAfterJobFinishes": "yes",
        "submitterPodTemplate.spec.containers.0.imagine": "x",
    },
    "RayService": {
        "upgradeStrategy.kind": "NewCluster",
        "serveConfigV2": {},
        "rayClusterConfig.headGroupSpec.template.spec.volumes.0": "shm",
    },
    "ResourceFlavor": {"nodeLabel": {}, "nodeLabels": {"pool": 1}, "nodeTaints": [{"key": "a"}]},
    "ClusterQueue": {
        "resourceGroups.0.flavors.0.resources.0.nominalQuota": "4 cores",
        "resourceGroups.0.coveredResources": "cpu",
        "preemption.withinClusterQueue": "Always",
    },
    "LocalQueue": {"clusterQueue": "Not a name", "queue": "a", "stopPolicy": "Never"},
    "WorkloadPriorityClass": {"value": "high", "values": 1, "apiVersion": "kueue.x-k8s.io/v1beta1"},
    "PodMonitor": {
        "podMetricsEndpoints.0.interval": "10 seconds",
        "podMetricsEndpoints.0.ports": "metrics",
        "selector.matchLabels": ["ray"],
    },
}
"""Wrong values of a manifest's spec by their paths, by kind."""


@pytest.mark.parametrize(("kind", "path"), [(kind, path) for kind, values in MUTATIONS.items() for path in values])
def test_schemas_find_wrong_values_and_unknown_keys(kind, path):
    manifest = deepcopy(manifests()[f"{kind} in a queue" if kind == "RayService" else kind])
    *parents, key = path.split(".")
    section = manifest.get("spec", manifest)
    for word in parents:
        section = section[int(word) if word.isdigit() else word]
    section[int(key) if key.isdigit() else key] = MUTATIONS[kind][path]
    assert len(schema_errors(manifest)) == 1


def test_clusters_in_a_queue_have_the_pods_that_their_run_needs():
    site = queued_site()
    run = run_spec(cluster={"workers": 9, "gpus_per_worker": 1}, train={"micro_batches": 9})
    job = yaml.safe_load(render_files(site, run)["kuberay/rayjob-tiny.yaml"])
    cluster = kuberay.ray_cluster(site)
    for manifest, worker_nodes in ((job, 2), (cluster, 4)):
        labels = manifest["metadata"]["labels"]
        names = {"kueue.x-k8s.io/queue-name": "training", "kueue.x-k8s.io/priority-class": "high"}
        assert labels.items() >= names.items()
        # Kueue admits a cluster once, with all pods that it will have, so it takes none with an autoscaler.
        _, data, workers = ray_groups(manifest)
        for group, size in ((data, 4), (workers, worker_nodes)):
            assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [size] * 3
        assert "enableInTreeAutoscaling" not in json.dumps(manifest)
    assert job["spec"]["shutdownAfterJobFinishes"]
    assert job["spec"].keys().isdisjoint({"clusterSelector", "suspend"})
    service = manifests()["RayService in a queue"]
    assert service["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    gang = queued_site(kueue=None, labels={"ray.io/gang-scheduling-enabled": "true", "volcano.sh/queue-name": "a"})
    assert kuberay.ray_cluster(gang)["spec"] == cluster["spec"]
    assert kuberay.ray_cluster(gang)["metadata"]["labels"].items() >= gang.labels.items()


def test_quota_is_the_sum_of_the_requests_of_all_pods():
    objects = {
        item["kind"]: item for item in yaml.safe_load(render_files(queued_site())["kuberay/kueue.yaml"])["items"]
    }
    queue, name = objects["ClusterQueue"]["spec"], objects["ResourceFlavor"]["metadata"]["name"]
    assert objects["LocalQueue"]["metadata"] == {"name": "training", "namespace": "default"}
    assert objects["LocalQueue"]["spec"]["clusterQueue"] == objects["ClusterQueue"]["metadata"]["name"]
    totals = Counter()
    job = manifests()["RayJob in a queue"]
    counts = [1, *(group["replicas"] for group in ray_groups(job)[1:]), 1]
    for pod, count in zip(pod_specs(job), counts, strict=True):
        for resource, quantity in pod["containers"][0]["resources"]["requests"].items():
            totals[resource] += count * int(quantity.removesuffix("Gi"))
    [group] = queue["resourceGroups"]
    [flavor] = group["flavors"]
    quotas = {entry["name"]: int(str(entry["nominalQuota"]).removesuffix("Gi")) for entry in flavor["resources"]}
    assert (quotas, flavor["name"]) == (totals, name)
    assert totals["rdma/ib"] == 32
    assert group["coveredResources"] == list(quotas)


def test_workers_get_devices_variables_and_machines_of_their_own():
    head, data, workers = ray_groups(manifests()["RayJob in a queue"])
    pod = workers["template"]["spec"]
    [container] = pod["containers"]
    assert container["resources"]["limits"]["rdma/ib"] == container["resources"]["requests"]["rdma/ib"] == "8"
    assert container["env"] == [{"name": "NCCL_IB_HCA", "value": "mlx5"}]
    assert [toleration["key"] for toleration in pod["tolerations"]] == ["nvidia.com/gpu", "team"]
    assert (pod["nodeSelector"], workers["template"]["metadata"]["annotations"].keys()) == (
        {"pool": "h100"},
        {"k8s.v1.cni.cncf.io/networks"},
    )
    for group in (head, data):
        assert group["template"].keys() == {"spec"}
        assert group["template"]["spec"].keys().isdisjoint({"tolerations", "nodeSelector"})


def test_pods_can_write_to_a_volume_owned_by_root():
    user = re.search(r"^RUN useradd .*--uid (\d+) ", render_files(SITE)["Containerfile"], re.M)
    spec = kuberay.ray_cluster(SITE)["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        # Without this policy, each start of a pod would set the group of all files in the storage. With it, this
        # happens only if the storage's root folder has another group.
        expected = {"fsGroup": int(user[1]), "fsGroupChangePolicy": "OnRootMismatch"}
        assert group["template"]["spec"]["securityContext"].items() >= expected.items()


@pytest.mark.parametrize("name", [name for name in manifests() if name.startswith("Ray")])
def test_pods_meet_the_restricted_pod_security_standard(name):
    manifest = manifests()[name]
    spec = manifest["spec"].get("rayClusterSpec") or manifest["spec"].get("rayClusterConfig") or manifest["spec"]
    containers = [spec["autoscalerOptions"]] if "autoscalerOptions" in spec else []
    for pod in pod_specs(manifest):
        context = pod["securityContext"]
        assert (context["runAsNonRoot"], context["runAsUser"]) == (True, kuberay.UID)
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        containers += pod["containers"]
    for container in containers:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def peers(rules, side, port):
    """Return the labels of the peers whom rules of a NetworkPolicy let use a TCP port; None stands for everybody.

    A peer of the namespace has the labels of its pod, and one of any namespace the word "elsewhere" before them.
    """
    allowed = []
    for rule in rules:
        if port in [entry["port"] for entry in rule.get("ports", [{"port": port}])]:
            for peer in rule.get(side, [None]):
                labels = list(peer["podSelector"].get("matchLabels", {}).values()) if peer else None
                allowed.append(["elsewhere", *labels] if peer and "namespaceSelector" in peer else labels)
    return allowed


def test_network_policy_opens_each_port_to_its_users_alone():
    spec = yaml.safe_load(render_files(SITE)["kuberay/networkpolicy.yaml"])["spec"]
    ray_pods, namespace = ["yes"], []
    assert spec["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    for port in (kuberay.HEAD_PORTS["dashboard"], kuberay.HEAD_PORTS["serve"]):
        assert peers(spec["ingress"], "from", port) == [ray_pods, namespace, ["elsewhere", "kuberay-operator"]]
    assert peers(spec["ingress"], "from", kuberay.HEAD_PORTS["metrics"]) == [ray_pods, ["elsewhere", "prometheus"]]
    for port in (kuberay.HEAD_PORTS["gcs"], kuberay.HEAD_PORTS["client"], 10002):
        assert peers(spec["ingress"], "from", port) == [ray_pods]
    for port in (53, 443, 6443, 6379):
        assert peers(spec["egress"], "to", port) == [ray_pods, None]
    assert peers(spec["egress"], "to", 80) == [ray_pods]
    bare = SITE.model_copy(update={"redis": None, "redis_secret": None})
    assert peers(kuberay.network_policy(bare)["spec"]["egress"], "to", 6379) == [ray_pods]


def test_pod_monitor_has_the_labels_of_the_site():
    monitor = yaml.safe_load(render_files(SITE)["kuberay/podmonitor.yaml"])
    assert monitor["metadata"]["labels"] == {"release": "prometheus"}


def test_image_installs_the_packages_of_rays_cloud_providers():
    import ray.autoscaler._private as private

    packages = {"boto3": "boto3", "botocore": "boto3", "googleapiclient": "google-api-python-client"}
    packages |= dict.fromkeys(("google", "google_auth_httplib2", "httplib2"), "google-auth-httplib2")
    packages |= {"packaging": "ray"}
    sources = [path for cloud in ("aws", "gcp") for path in (Path(private.__file__).parent / cloud).rglob("*.py")]
    imports = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom) and node.module}
    imported_packages = {name.split(".")[0] for name in names} - {"ray", *sys.stdlib_module_names}
    assert {"boto3", "googleapiclient"} <= imported_packages
    installs = " ".join(line for line in render_files(SITE)["Containerfile"].splitlines() if not line.startswith("#"))
    for name in imported_packages:
        assert re.search(rf"[ ']{packages[name]}[ \[]", installs), name


def test_image_has_compilers_extras_and_the_server_environment():
    """Triton needs a C compiler when it first compiles a kernel, and our own kernels need a C++ compiler."""
    text = render_files(SITE)["Containerfile"]
    apt_packages = re.search(r"apt-get install (.*) \\\n", text)[1].split()
    assert {"gcc", "g++", "libc6-dev"} <= set(apt_packages)
    [env_lines] = re.findall(r"^ENV ((?:.*\\\n)*.*)\n", text, re.M)
    assert dict(word.split("=") for word in env_lines.replace("\\\n", " ").split()) == ENVIRONMENT
    extras = {extra for words in re.findall(r"\.whl\[(.*?)\]'", text) for extra in words.split(",")}
    declared_extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"deepspeed", "eval", "mlflow", "vision", "vllm", "wandb"} == extras <= set(declared_extras)


def test_cluster_has_token_autoscaling_and_fault_tolerance():
    spec = kuberay.ray_cluster(SITE)["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"]
    assert spec["gcsFaultToleranceOptions"]["redisAddress"] == "redis:6379"
    data, workers = spec["workerGroupSpecs"]
    assert [(g["groupName"], g["minReplicas"], g["maxReplicas"]) for g in (data, workers)] == [
        ("data", 0, 4),
        ("workers", 0, 4),
    ]
    [container] = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": "96", "memory": "1000Gi", "nvidia.com/gpu": "8"}
    assert "nvidia.com/gpu" not in data["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize(
    ("name", "make"), [("aws", ray_up.aws_config), ("gcp", ray_up.gcp_config), ("on_premise", ray_up.on_premise_config)]
)
def test_cluster_files_are_valid_for_ray(name, make, capfd):
    from ray.autoscaler._private.commands import warn_about_bad_start_command
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = make(SITE, getattr(SITE, name))
    validate_config(prepare_config(config))
    capfd.readouterr()
    warn_about_bad_start_command(config["head_start_ray_commands"])
    assert "".join(capfd.readouterr()) == "", "Ray takes the head's command for one that starts a worker"
    assert "--block" not in config["worker_start_ray_commands"][-1], "Ray waits for these commands to end"
    start_commands = "\n".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    assert start_commands.count("RAY_AUTH_MODE=token") == 2
    assert "--dashboard-host=127.0.0.1" in start_commands
    assert ray_up.TOKEN_PATH in config["file_mounts"]
    [discovery] = yaml.safe_load(render_files(SITE)["prometheus/prometheus.yml"])["scrape_configs"][0][
        "file_sd_configs"
    ]
    folder = Path(discovery["files"][0]).parent
    assert f"--volume={folder}:{folder}" in config["docker"]["run_options"], (
        "a Prometheus outside the container cannot read it"
    )
    assert f"mkdir -p -m 1777 {folder}" in config["initialization_commands"], "Docker would create it, owned by root"
    installs = [command for command in config["initialization_commands"] if "apt-get" in command]
    assert all("-o DPkg::Lock::Timeout=300 " in command for command in installs)
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**config, "available_node_typos": {}})


@pytest.mark.parametrize(("gpus", "spot"), [(8, True), (8, False), (0, True), (0, False)])
def test_gcp_workers_with_gpus_have_a_driver_and_terminate_on_maintenance(gpus, spot):
    """Google refuses machines with GPUs unless they terminate on maintenance, since they cannot migrate."""
    site = SITE.model_copy(update={"workers": SITE.workers.model_copy(update={"gpus": gpus})})
    types = ray_up.gcp_config(site, SITE.gcp.model_copy(update={"spot": spot}))["available_node_types"]
    node_configs = {name: node_type["node_config"] for name, node_type in types.items()}
    images = {
        name: node_config["disks"][0]["initializeParams"]["sourceImage"] for name, node_config in node_configs.items()
    }
    assert ("nvidia" in images["workers"]) == (gpus > 0)
    assert images["head"] == images["data"] == f"{ray_up.GCP_IMAGES}/{ray_up.GCP_CPU_FAMILY}"
    expected = {**({"preemptible": True} if spot else {}), **({"onHostMaintenance": "TERMINATE"} if gpus else {})}
    assert {
        key: value for entry in node_configs["workers"].get("scheduling", []) for key, value in entry.items()
    } == expected
    assert "scheduling" not in node_configs["head"]


@pytest.mark.parametrize(("name", "make"), [("aws", ray_up.aws_config), ("gcp", ray_up.gcp_config)])
def test_all_machines_of_a_cloud_use_the_given_image(name, make):
    cloud = getattr(SITE, name).model_copy(update={"image": "an-image"})
    for node_type in make(SITE, cloud)["available_node_types"].values():
        node_config = node_type["node_config"]
        assert (
            node_config["ImageId"] if name == "aws" else node_config["disks"][0]["initializeParams"]["sourceImage"]
        ) == "an-image"


def test_aws_needs_an_image_for_workers_with_gpus():
    site_tree = SITE.model_dump()
    del site_tree["aws"]["image"]
    with pytest.raises(SpecError, match=r"aws needs image where workers have GPUs, .* driver 580 or newer"):
        validate_section(SiteSpec, site_tree, "site")
    site_tree["workers"]["gpus"] = 0
    types = ray_up.aws_config(site := validate_section(SiteSpec, site_tree, "site"), site.aws)["available_node_types"]
    # Without ImageId, Ray fills in an image of its own.
    assert all("ImageId" not in node_type["node_config"] for node_type in types.values())


def test_slurm_script_is_valid_bash():
    script = render_files(SITE)["slurm.sh"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "{{" not in script
    assert "#SBATCH --gpus-per-node=8" in script
    assert "#SBATCH --account" not in script


@pytest.mark.parametrize(("workers", "gpus_per_node"), [(1, 8), (8, 8), (9, 8), (32, 8), (6, 4)])
def test_worker_node_count_matches_the_planner(workers, gpus_per_node):
    site = SITE.model_copy(update={"workers": SITE.workers.model_copy(update={"gpus": gpus_per_node})})
    spec = run_spec(cluster={"workers": workers, "gpus_per_worker": 1}, train={"micro_batches": workers})
    worker_nodes = pack_workers(
        hypothetical_nodes(SITE.workers.max, SITE.workers.cpus, gpus_per_node, None), 1, 1, workers
    )
    assert count_worker_nodes(site, spec) == len(set(worker_nodes)) == -(-workers // gpus_per_node)


def test_run_that_does_not_fit_is_rejected():
    for cluster in ({"workers": 33, "gpus_per_worker": 1}, {"workers": 1, "cpus_per_worker": 97}):
        with pytest.raises(SpecError, match="do not fit on 4 nodes"):
            render_files(SITE, run_spec(cluster=cluster, train={"micro_batches": cluster["workers"]}))
    small_site = validate_section(SiteSpec, {"image": "x", "data": {"cpus": 1, "memory_gib": 1, "max": 1},
                               "workers": {"cpus": 4, "memory_gib": 8, "max": 1}}, "site")  # fmt: skip
    with pytest.raises(SpecError, match="leave 1 CPUs for the data stream, which needs 4"):
        render_files(small_site, run_spec(cluster={"workers": 4}, train={"micro_batches": 4}))


def test_run_outside_the_shared_storage_is_rejected(tmp_path):
    with pytest.raises(SpecError, match=r"storage: .* is not below /mnt/mhmoe"):
        render_files(SITE, run_spec(tmp_path))
    with pytest.raises(SpecError, match="shared_filesystem=true"):
        render_files(SITE, run_spec(cluster={"shared_filesystem": False}))
    assert "kuberay/rayjob-tiny.yaml" in render_files(SITE, run_spec())
    bare = SITE.model_copy(update={"storage": SITE.storage.model_copy(update={"claim": None})})
    with pytest.raises(
        SpecError, match=r"storage: /mnt/mhmoe.* is a file path, but storage\.claim of the site is null"
    ):
        render_files(bare, run_spec())
    spec = run_spec(data={"sources": {"web": {"path": "/home/me/text"}}})
    with pytest.raises(SpecError, match=r"data\.sources\.web\.path: /home/me/text is not below /mnt/mhmoe"):
        render_files(SITE, spec)
    # Sources of data that is prepared already are not read.
    (tmp_path / "manifest.json").write_text(make_manifest({"web": 1}).model_dump_json())
    prepared = spec.data.model_copy(update={"prepared": tmp_path})
    site = SITE.model_copy(update={"storage": SITE.storage.model_copy(update={"mount": str(tmp_path.parent)})})
    spec = spec.model_copy(update={"data": prepared, "storage": tmp_path / "runs"})
    assert "kuberay/rayjob-tiny.yaml" in render_files(site, spec)


CLOUD = {"region": "r", "zone": "z", "project": "p", "head": "h", "data": "d", "workers": "w", "image": "i"}
NODE = {"cpus": 1, "memory_gib": 1, "labels": {"rack": "r1"}}
FULL_SITE = {
    "name": "lab",
    "namespace": "lab",
    "image": "x",
    "head": {"cpus": 1, "memory_gib": 1},
    "data": {**NODE, "max": 1},
    "workers": {
        **NODE,
        "max": 1,
        "pod": {
            "node_selector": {"pool": "p"},
            "tolerations": [{"key": "k", "value": "v"}],
            "annotations": {"network": "n"},
            "devices": {"rdma/ib": 1},
            "environment": {"NCCL_DEBUG": "INFO"},
        },
    },
    "storage": {"mount": "/mnt/a", "claim": "b", "nfs": "host:/c"},
    "token_file": "~/token",
    "redis": "host:6379",
    "redis_secret": "redis",
    "store_secret": "keys",
    "tracker_secret": "trackers",
    "kueue": {"queue": "q", "priority": "high", "priorities": {"high": 1}},
    "labels": {"queue-of-volcano": "q"},
    "service_account": "trainer",
    "monitor_labels": {"release": "r"},
    "gateway": "istio",
    "aws": CLOUD,
    "gcp": CLOUD,
    "on_premise": {"user": "u", "head": "h", "workers": ["w"]},
    "slurm": {"partition": "p", "account": "a", "nodes": 1, "time": "24:00:00"},
}


def _variants_with_a_line_break(tree):
    """Yield one copy of a tree for each of its texts, in which that text has a line break.

    The keys of mappings, such as the labels `rack` and `release`, are texts too.
    """
    if isinstance(tree, str):
        yield f"{tree}\nid"
    elif isinstance(tree, list):
        for i, part in enumerate(tree):
            yield from ([*tree[:i], variant, *tree[i + 1 :]] for variant in _variants_with_a_line_break(part))
    elif isinstance(tree, dict):
        for key, part in tree.items():
            yield from ({**tree, key: variant} for variant in _variants_with_a_line_break(part))
            if key in ("rack", "release", "pool", "network", "rdma/ib", "NCCL_DEBUG", "high", "queue-of-volcano"):
                yield {f"{key}\nid": part}


def test_text_of_two_lines_is_rejected_anywhere_in_a_site():
    site = validate_section(SiteSpec, FULL_SITE, "site")
    unset = [name for name, value in site if value is None]
    unset += [f"{name}.{key}" for name in ("storage", "aws", "slurm") for key, v in getattr(site, name) if v is None]
    assert unset == []
    variants = list(_variants_with_a_line_break(FULL_SITE))
    assert len(variants) == 53
    for variant in variants:
        with pytest.raises(SpecError, match="should match pattern"):
            validate_section(SiteSpec, variant, "site")


@pytest.mark.parametrize(
    "bad_section",
    [
        {"image": "x; rm -rf /"},
        {"image": "x\ny"},
        {"image": "$(id)"},
        {"name": "a b"},
        {"monitor_labels": {"release": "a b"}},
        {"storage": {"mount": "/mnt/$(id)"}},
        {"storage": {"nfs": "host:/x; id"}},
        {"token_file": "~/x y"},
        {"slurm": {"partition": "a\nid", "nodes": 1}},
        {"slurm": {"partition": "a", "nodes": 1, "time": "`id`"}},
        {"on_premise": {"user": "a;b", "head": "h", "workers": ["w"]}},
    ],
)
def test_shell_syntax_in_values_is_rejected(bad_section):
    site_tree = {"image": "x", "workers": {"cpus": 1, "memory_gib": 1, "max": 1}, **bad_section}
    with pytest.raises(SpecError, match="should match pattern"):
        validate_section(SiteSpec, site_tree, "site")


def pod_tree(**pod):
    """Return the section of a site's workers whose pods have these settings."""
    return {"workers": {"cpus": 1, "memory_gib": 1, "max": 1, "pod": pod}}


@pytest.mark.parametrize(
    ("bad_section", "reason"),
    [
        ({"workers": {"cpus": 1, "memory_gib": 1, "min": 2, "max": 1}}, r"min \(2\) is more than max \(1\)"),
        ({"head": {"cpus": 4, "memory_gib": 16, "gpus": 1}}, "head and data nodes are for CPUs"),
        ({"head": {"cpus": 4, "memory_gib": 16, "labels": {"rack": "r1"}}}, "its labels would be ignored"),
        (
            {"kueue": {"queue": "q", "priority": "low", "priorities": {"high": 1}}},
            "priority low is not among priorities",
        ),
        ({"kueue": {"queue": "Training Queue"}}, "should match pattern"),
        ({"kueue": {"queue": "q", "priorities": {"high": 2**31}}}, "less than"),
        ({"labels": {"kueue.x-k8s.io/queue-name": "q"}}, "labels of Kueue .*: set kueue instead"),
        (pod_tree(devices={"rdma/ib": 0}), "greater than 0"),
        (pod_tree(devices={"ib": 1}), "should match pattern"),
        (pod_tree(devices={"nvidia.com/gpu": 8}), "set gpus of the group"),
        (pod_tree(environment={"NCCL_IB_HCA": "mlx5"}), "NCCL_IB_HCA is for RDMA, but the pods get no RDMA device"),
        (pod_tree(environment={"WANDB_API_KEY": "x"}), "WANDB_API_KEY would be readable in manifests"),
        (pod_tree(tolerations=[{"key": "a", "effect": "NoStart"}]), "'NoSchedule', 'PreferNoSchedule' or 'NoExecute'"),
        ({"redis_secret": "redis"}, "the password of redis, but redis is not set"),
        ({"gcp": {"region": "a", "head": "b", "data": "c", "workers": "d"}}, "gcp needs zone and project"),
    ],
)
def test_inconsistent_site_is_rejected(bad_section, reason):
    site_tree = {"image": "x", "workers": {"cpus": 1, "memory_gib": 1, "max": 1}, **bad_section}
    with pytest.raises(SpecError, match=reason):
        validate_section(SiteSpec, site_tree, "site")


def test_cluster_folder_holds_the_rendered_files():
    """The files in the repository's folder cluster/ are examples, which `make render` writes."""
    for name, text in render_files(SITE).items():
        assert (ROOT / "cluster" / name).read_text() == text, name
    paths = {str(p.relative_to(ROOT / "cluster")) for p in (ROOT / "cluster").rglob("*") if p.is_file()}
    assert paths - set(render_files(SITE)) == {"README.md", "site.yaml"}


def test_submitted_spec_is_written_with_its_overrides(tmp_path):
    rendered = render_files(SITE, run_spec(train={"steps": 7}))
    config_map = yaml.safe_load(rendered["kuberay/spec-tiny.yaml"])
    [(file_name, text)] = config_map["data"].items()
    (tmp_path / "spec.yaml").write_text(text)
    assert load_resolved_spec(tmp_path / "spec.yaml").train.steps == 7
    job = yaml.safe_load(rendered["kuberay/rayjob-tiny.yaml"])
    # Ray runs the entry point on the head.
    [head, *_] = pod_specs(job)
    [volume] = [volume for volume in head["volumes"] if "configMap" in volume]
    [mount] = [mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] == volume["name"]]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    assert f"mhmoe submit {mount['mountPath']}/{file_name} " in job["spec"]["entrypoint"]


def test_checkpoint_on_this_machine_is_rejected(tmp_path):
    def render_service(folder):
        return render_files(
            SITE, None, application_config("tiny", location(folder) / "checkpoints/a", ServeSpec(), "tiny")
        )

    with pytest.raises(SpecError, match="is not below /mnt/mhmoe, which nodes of the site share"):
        render_service(tmp_path)
    for folder in (MOUNT / "runs/tiny", "s3://bucket/runs/tiny"):
        assert "kuberay/rayservice-tiny.yaml" in render_service(folder)


def test_name_too_long_for_kuberay_is_rejected():
    assert "kuberay/rayjob-" + "x" * 41 + ".yaml" in render_files(
        SITE, run_spec().model_copy(update={"name": "x" * 41})
    )
    long_site = SITE.model_copy(update={"name": "mhmoe2"})
    with pytest.raises(SpecError, match="its name has 48 characters, and KubeRay takes 47"):
        render_files(long_site, run_spec().model_copy(update={"name": "x" * 41}))


def test_invalid_kubernetes_names_and_labels_are_rejected():
    with pytest.raises(SpecError, match="RayJob mhmoe-a-: KubeRay takes names of small letters"):
        render_files(SITE, run_spec().model_copy(update={"name": "a-"}))
    site_tree = {"image": "x", "workers": {"cpus": 1, "memory_gib": 1, "max": 1}}
    for label in ("a:b", "a/b", "x" * 64):
        with pytest.raises(SpecError, match="should match pattern"):
            validate_section(SiteSpec, {**site_tree, "monitor_labels": {"release": label}}, "site")


def test_rendered_yaml_can_be_parsed():
    for name, text in render_files(SITE, run_spec()).items():
        if name.endswith((".yaml", ".yml")):
            assert isinstance(yaml.safe_load(text), dict)
