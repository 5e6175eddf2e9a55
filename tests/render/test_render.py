"""Rendered manifests against the schemas of the programs that read them, and against the planner."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.placement import on_paper, packed
from mhmoe_ray.render import kuberay, ray_up
from mhmoe_ray.render.files import files, nodes_for
from mhmoe_ray.serve.config import ENVIRONMENT, application_config
from mhmoe_ray.spec import ServeSpec, checked, load_resolved_spec, load_site
from mhmoe_ray.spec.site import SiteSpec
from mhmoe_ray.storage import location
from tests.specs import tiny_spec

ROOT = Path(__file__).parents[2]
SITE = load_site(ROOT / "cluster/site.yaml")
SCHEMAS = json.loads((Path(__file__).parent / "kuberay.json").read_text())
MOUNT = Path(SITE.storage.mount)


def run(folder=MOUNT, **sections):
    return tiny_spec(folder, **{**sections, "cluster": {"shared_filesystem": True, **sections.get("cluster", {})}})


def closed(schema):
    """Return a schema in which unknown keys are errors; Kubernetes drops them silently."""
    if isinstance(schema, dict):
        found = {key: closed(value) for key, value in schema.items()}
        if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
            found["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
        return found
    return [closed(each) for each in schema] if isinstance(schema, list) else schema


def mistakes(manifest):
    schema = closed(SCHEMAS[manifest["kind"]]) | {"definitions": closed(SCHEMAS["definitions"])}
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, which the schema does not tell
    return [e.json_path for e in jsonschema.Draft7Validator(schema).iter_errors(manifest)]


def manifests():
    application = application_config(
        "tiny", MOUNT / "runs/tiny-abcdef/checkpoints/step_00000020.1", ServeSpec(), "tiny"
    )
    bare = SITE.model_copy(update={"redis": None, "redis_secret": None})
    labelled = SITE.workers.model_copy(update={"labels": {"rack": "r1"}})
    return {
        "RayCluster": kuberay.ray_cluster(SITE),
        "RayCluster without redis": kuberay.ray_cluster(bare),
        "RayCluster with labels": kuberay.ray_cluster(SITE.model_copy(update={"workers": labelled})),
        "RayJob": kuberay.ray_job(SITE, "/mnt/mhmoe/jobs/tiny.yaml", "tiny"),
        "RayService": kuberay.ray_service(SITE, application),
    }


@pytest.mark.parametrize("name", manifests())
def test_manifests_are_what_kuberay_publishes(name):
    assert mistakes(manifests()[name]) == []


def test_the_schemas_tell_mistakes():
    manifest = kuberay.ray_cluster(SITE)
    manifest["spec"]["authOptions"] = {"mode": "open"}
    manifest["spec"]["headGroupSpec"]["templates"] = {}
    manifest["spec"]["workerGroupSpecs"][1]["minReplicas"] = "two"
    assert sorted(mistakes(manifest)) == [
        "$.spec.authOptions.mode",
        "$.spec.headGroupSpec",
        "$.spec.workerGroupSpecs[1].minReplicas",
    ]


def test_pods_may_write_to_a_volume_that_root_owns():
    user = re.search(r"^RUN useradd .*--uid (\d+) ", files(SITE)["Containerfile"], re.M)
    spec = kuberay.ray_cluster(SITE)["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        # Without the policy each start of a pod goes through all files of the storage.
        expected = {"fsGroup": int(user[1]), "fsGroupChangePolicy": "OnRootMismatch"}
        assert group["template"]["spec"]["securityContext"] == expected


def test_the_operator_of_prometheus_finds_the_monitor_by_the_labels_of_the_site():
    monitor = yaml.safe_load(files(SITE)["kuberay/podmonitor.yaml"])
    assert monitor["metadata"]["labels"] == {"release": "prometheus"}


def test_the_image_has_what_ray_imports_to_start_machines():
    import ray.autoscaler._private as private

    packages = {"boto3": "boto3", "botocore": "boto3", "googleapiclient": "google-api-python-client"}
    packages |= dict.fromkeys(("google", "google_auth_httplib2", "httplib2"), "google-auth-httplib2")
    packages |= {"packaging": "ray"}
    sources = [path for cloud in ("aws", "gcp") for path in (Path(private.__file__).parent / cloud).rglob("*.py")]
    imports = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom) and node.module}
    others = {name.split(".")[0] for name in names} - {"ray", *sys.stdlib_module_names}
    assert {"boto3", "googleapiclient"} <= others
    installs = " ".join(line for line in files(SITE)["Containerfile"].splitlines() if not line.startswith("#"))
    for name in others:
        assert re.search(rf"[ ']{packages[name]}[ \[]", installs), name


def test_the_image_has_compilers_the_extras_of_jobs_and_the_environment_of_servers():
    """torch's Triton needs a C compiler where it first runs, and our own kernels need one of C++."""
    text = files(SITE)["Containerfile"]
    installed = re.search(r"apt-get install (.*) \\\n", text)[1].split()
    assert {"gcc", "g++", "libc6-dev"} <= set(installed)
    [declared] = re.findall(r"^ENV ((?:.*\\\n)*.*)\n", text, re.M)
    assert dict(word.split("=") for word in declared.replace("\\\n", " ").split()) == ENVIRONMENT
    extras = re.search(r"'/src\[(.*?)\]'", text)[1].split(",")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"deepspeed", "eval", "mlflow"} == set(extras) <= set(known)


def test_a_cluster_wants_a_token_scales_and_survives_its_head():
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
    ("name", "make"), [("aws", ray_up.aws), ("gcp", ray_up.gcp), ("on_premise", ray_up.on_premise)]
)
def test_cluster_files_are_what_ray_takes(name, make, capfd):
    from ray.autoscaler._private.commands import warn_about_bad_start_command
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = make(SITE, getattr(SITE, name))
    validate_config(prepare_config(config))
    capfd.readouterr()
    warn_about_bad_start_command(config["head_start_ray_commands"])
    assert "".join(capfd.readouterr()) == "", "a head that starts workers"
    assert "--block" not in config["worker_start_ray_commands"][-1], "Ray waits for these commands to end"
    started = "\n".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    assert started.count("RAY_AUTH_MODE=token") == 2
    assert "--dashboard-host=127.0.0.1" in started
    assert ray_up.TOKEN in config["file_mounts"]
    [discovery] = yaml.safe_load(files(SITE)["prometheus/prometheus.yml"])["scrape_configs"][0]["file_sd_configs"]
    folder = Path(discovery["files"][0]).parent
    assert f"--volume={folder}:{folder}" in config["docker"]["run_options"], "a Prometheus beside the container"
    assert f"mkdir -p -m 1777 {folder}" in config["initialization_commands"], "else Docker makes it, and root owns it"
    installs = [command for command in config["initialization_commands"] if "apt-get" in command]
    assert all("-o DPkg::Lock::Timeout=300 " in command for command in installs)
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**config, "available_node_typos": {}})


@pytest.mark.parametrize(("gpus", "spot"), [(8, True), (8, False), (0, True), (0, False)])
def test_gcp_gives_workers_with_gpus_a_driver_and_hosts_that_end_them(gpus, spot):
    """Google refuses a machine with GPUs that is to move when its host is serviced."""
    site = SITE.model_copy(update={"workers": SITE.workers.model_copy(update={"gpus": gpus})})
    types = ray_up.gcp(site, SITE.gcp.model_copy(update={"spot": spot}))["available_node_types"]
    node = {name: of["node_config"] for name, of in types.items()}
    images = {name: of["disks"][0]["initializeParams"]["sourceImage"] for name, of in node.items()}
    assert ("nvidia" in images["workers"]) == (gpus > 0)
    assert images["head"] == images["data"] == f"{ray_up.GCP_IMAGES}/{ray_up.GCP_CPU}"
    expected = {**({"preemptible": True} if spot else {}), **({"onHostMaintenance": "TERMINATE"} if gpus else {})}
    assert {key: value for each in node["workers"].get("scheduling", []) for key, value in each.items()} == expected
    assert "scheduling" not in node["head"]


@pytest.mark.parametrize(("name", "make"), [("aws", ray_up.aws), ("gcp", ray_up.gcp)])
def test_all_machines_of_a_cloud_start_from_the_image_that_is_named(name, make):
    cloud = getattr(SITE, name).model_copy(update={"image": "an-image"})
    for of in make(SITE, cloud)["available_node_types"].values():
        node = of["node_config"]
        assert (node["ImageId"] if name == "aws" else node["disks"][0]["initializeParams"]["sourceImage"]) == "an-image"


def test_an_image_is_needed_where_rays_default_has_an_old_driver():
    given = SITE.model_dump()
    del given["aws"]["image"]
    with pytest.raises(SpecError, match=r"aws needs image where workers have GPUs: an AMI .* driver 580 or newer"):
        checked(SiteSpec, given, "site")
    given["workers"]["gpus"] = 0
    types = ray_up.aws(bare := checked(SiteSpec, given, "site"), bare.aws)["available_node_types"]
    assert all("ImageId" not in of["node_config"] for of in types.values())  # Ray fills in its own


def test_the_script_is_one_of_bash():
    script = files(SITE)["slurm.sh"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "{{" not in script
    assert "#SBATCH --gpus-per-node=8" in script
    assert "#SBATCH --account" not in script


@pytest.mark.parametrize(("workers", "gpus_per_node"), [(1, 8), (8, 8), (9, 8), (32, 8), (6, 4)])
def test_a_run_takes_the_nodes_that_the_planner_packs_it_on(workers, gpus_per_node):
    site = SITE.model_copy(update={"workers": SITE.workers.model_copy(update={"gpus": gpus_per_node})})
    spec = run(cluster={"workers": workers, "gpus_per_worker": 1}, train={"micro_batches": workers})
    places = packed(on_paper(SITE.workers.max, SITE.workers.cpus, gpus_per_node, None), 1, 1, workers)
    assert nodes_for(site, spec) == len(set(places)) == -(-workers // gpus_per_node)


def test_a_run_that_does_not_fit_is_refused():
    for cluster in ({"workers": 33, "gpus_per_worker": 1}, {"workers": 1, "cpus_per_worker": 97}):
        with pytest.raises(SpecError, match="do not fit on 4 nodes"):
            files(SITE, run(cluster=cluster, train={"micro_batches": cluster["workers"]}))
    small = checked(SiteSpec, {"image": "x", "data": {"cpus": 1, "memory_gib": 1, "max": 1},
                               "workers": {"cpus": 4, "memory_gib": 8, "max": 1}}, "site")  # fmt: skip
    with pytest.raises(SpecError, match="leave 1 CPUs for the data stream, which needs 4"):
        files(small, run(cluster={"workers": 4}, train={"micro_batches": 4}))


def test_a_run_that_lies_elsewhere_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"storage: .* is not below /mnt/mhmoe"):
        files(SITE, run(tmp_path))
    with pytest.raises(SpecError, match="shared_filesystem=true"):
        files(SITE, run(cluster={"shared_filesystem": False}))
    assert "kuberay/rayjob-tiny.yaml" in files(SITE, run())


CLOUD = {"region": "r", "zone": "z", "project": "p", "head": "h", "data": "d", "workers": "w", "image": "i"}
NODE = {"cpus": 1, "memory_gib": 1, "labels": {"rack": "r1"}}
EVERYTHING = {
    "name": "lab",
    "namespace": "lab",
    "image": "x",
    "head": {"cpus": 1, "memory_gib": 1},
    "data": {**NODE, "max": 1},
    "workers": {**NODE, "max": 1},
    "storage": {"mount": "/mnt/a", "claim": "b", "nfs": "host:/c"},
    "token_file": "~/token",
    "redis": "host:6379",
    "redis_secret": "redis",
    "monitor_labels": {"release": "r"},
    "gateway": "istio",
    "aws": CLOUD,
    "gcp": CLOUD,
    "on_premise": {"user": "u", "head": "h", "workers": ["w"]},
    "slurm": {"partition": "p", "account": "a", "nodes": 1, "time": "24:00:00"},
}


def _spoilt(tree):
    """Yield copies of a tree, in each of which another text has two lines.

    Texts include the keys of labels.
    """
    if isinstance(tree, str):
        yield f"{tree}\nid"
    elif isinstance(tree, list):
        for i, part in enumerate(tree):
            yield from ([*tree[:i], bad, *tree[i + 1 :]] for bad in _spoilt(part))
    elif isinstance(tree, dict):
        for key, part in tree.items():
            yield from ({**tree, key: bad} for bad in _spoilt(part))
            if key in ("rack", "release"):
                yield {f"{key}\nid": part}


def test_no_text_of_a_site_can_have_two_lines():
    site = checked(SiteSpec, EVERYTHING, "site")
    unset = [name for name, value in site if value is None]
    unset += [f"{name}.{key}" for name in ("storage", "aws", "slurm") for key, v in getattr(site, name) if v is None]
    assert unset == []
    spoilt = list(_spoilt(EVERYTHING))
    assert len(spoilt) == 36
    for wrong in spoilt:
        with pytest.raises(SpecError, match="should match pattern"):
            checked(SiteSpec, wrong, "site")


@pytest.mark.parametrize(
    "wrong",
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
def test_values_cannot_hold_what_a_shell_would_run(wrong):
    given = {"image": "x", "workers": {"cpus": 1, "memory_gib": 1, "max": 1}, **wrong}
    with pytest.raises(SpecError, match="should match pattern"):
        checked(SiteSpec, given, "site")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"workers": {"cpus": 1, "memory_gib": 1, "min": 2, "max": 1}}, r"min \(2\) is more than max \(1\)"),
        ({"head": {"cpus": 4, "memory_gib": 16, "gpus": 1}}, "head and data nodes are for CPUs"),
        ({"head": {"cpus": 4, "memory_gib": 16, "labels": {"rack": "r1"}}}, "its labels would be ignored"),
        ({"redis_secret": "redis"}, "the password of redis, of which there is none"),
        ({"gcp": {"region": "a", "head": "b", "data": "c", "workers": "d"}}, "gcp needs zone and project"),
    ],
)
def test_a_site_that_contradicts_itself_is_refused(wrong, why):
    given = {"image": "x", "workers": {"cpus": 1, "memory_gib": 1, "max": 1}, **wrong}
    with pytest.raises(SpecError, match=why):
        checked(SiteSpec, given, "site")


def test_the_folder_cluster_holds_what_is_rendered():
    """The test keeps the examples from growing old; `make render` writes them anew."""
    for name, text in files(SITE).items():
        assert (ROOT / "cluster" / name).read_text() == text, name
    written = {str(p.relative_to(ROOT / "cluster")) for p in (ROOT / "cluster").rglob("*") if p.is_file()}
    assert written - set(files(SITE)) == {"README.md", "site.yaml"}


def test_the_spec_that_a_job_submits_is_written_with_its_overrides(tmp_path):
    rendered = files(SITE, run(train={"steps": 7}))
    (tmp_path / "spec.yaml").write_text(rendered["jobs/tiny.yaml"])
    assert load_resolved_spec(tmp_path / "spec.yaml").train.steps == 7
    job = yaml.safe_load(rendered["kuberay/rayjob-tiny.yaml"])
    assert f"mhmoe submit {MOUNT}/jobs/tiny.yaml " in job["spec"]["entrypoint"]


def test_a_checkpoint_of_this_machine_is_refused(tmp_path):
    def served(folder):
        return files(SITE, None, application_config("tiny", location(folder) / "checkpoints/a", ServeSpec(), "tiny"))

    with pytest.raises(SpecError, match="is not below /mnt/mhmoe, which nodes of the site share"):
        served(tmp_path)
    for place in (MOUNT / "runs/tiny", "s3://bucket/runs/tiny"):
        assert "kuberay/rayservice-tiny.yaml" in served(place)


def test_names_that_kuberay_would_refuse_are_refused():
    assert "kuberay/rayjob-" + "x" * 41 + ".yaml" in files(SITE, run().model_copy(update={"name": "x" * 41}))
    long = SITE.model_copy(update={"name": "mhmoe2"})
    with pytest.raises(SpecError, match="its name has 48 characters, and KubeRay takes 47"):
        files(long, run().model_copy(update={"name": "x" * 41}))


def test_names_and_labels_that_kubernetes_would_refuse_are_refused():
    with pytest.raises(SpecError, match="RayJob mhmoe-a-: Kubernetes takes names of small letters"):
        files(SITE, run().model_copy(update={"name": "a-"}))
    given = {"image": "x", "workers": {"cpus": 1, "memory_gib": 1, "max": 1}}
    for wrong in ("a:b", "a/b", "x" * 64):
        with pytest.raises(SpecError, match="should match pattern"):
            checked(SiteSpec, {**given, "monitor_labels": {"release": wrong}}, "site")


def test_yaml_reads_back():
    for name, text in files(SITE, run()).items():
        if name.endswith((".yaml", ".yml")):
            assert isinstance(yaml.safe_load(text), dict)
