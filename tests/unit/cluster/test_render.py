"""From a cluster description to files that Ray's launcher, AWS and Kubernetes take."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from eagleray.cluster.description import ClusterDescription, load_description
from eagleray.cluster.render import render
from eagleray.config.load import build_section
from eagleray.errors import ConfigError
from eagleray.placement import NODE_GROUPS_VARIABLE


@pytest.fixture(scope="module")
def description(repository: Path) -> ClusterDescription:
    return load_description(repository / "cluster" / "cluster.yaml")


@pytest.fixture(scope="module")
def files(description: ClusterDescription) -> dict[str, str]:
    return render(description)


def changed(description: ClusterDescription, **values: Any) -> ClusterDescription:
    return build_section(ClusterDescription, description.model_dump(mode="json") | values, "cluster.yaml")


def everything_in(document: Any) -> Iterator[tuple[str, Any]]:
    """Yield all keys of a document with their values, at any depth."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield key, value
            yield from everything_in(value)
    elif isinstance(document, list):
        for value in document:
            yield from everything_in(value)


def documents(files: dict[str, str]) -> Iterator[tuple[str, Any]]:
    for name, text in files.items():
        for document in [json.loads(text)] if name.endswith(".json") else yaml.safe_load_all(text):
            yield name, document


def test_the_files_in_the_repository_are_those_of_its_description(files: dict[str, str], repository: Path) -> None:
    for name, text in files.items():
        path = repository / "cluster" / name
        assert path.exists() and path.read_text() == text, f"{name}: run `eagleray cluster render cluster/cluster.yaml --to cluster`"


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_rays_launcher_accepts_them(files: dict[str, str], cloud: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(files[f"{cloud}.yaml"]))
    validate_config(config)
    types = config["available_node_types"]
    assert {name: kind["max_workers"] for name, kind in types.items() if name != "head"} == {
        "decode": 8,
        "train-spot": 16,
        "train": 16,
        "serve": 4,
    }
    assert all(kind["min_workers"] == 0 for kind in types.values()), "an idle cluster is its head alone"
    assert types["head"]["resources"] == {"CPU": 0, "queue:research": 8, "queue:production": 16}, "no work lands on the head"


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_spot_nodes_come_first_where_on_demand_ones_may_follow(files: dict[str, str], cloud: str) -> None:
    types = yaml.safe_load(files[f"{cloud}.yaml"])["available_node_types"]
    assert types["train-spot"]["priority"] > types["train"]["priority"]
    assert types["train-spot"]["labels"] == types["train"]["labels"] == {"eagleray.io/group": "train"}
    is_spot = {
        name: kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        or kind["node_config"].get("scheduling", {}).get("provisioningModel") == "SPOT"
        for name, kind in types.items()
    }
    assert is_spot == {"head": False, "decode": True, "train-spot": True, "train": False, "serve": False}


def test_every_node_knows_the_groups(files: dict[str, str], description: ClusterDescription) -> None:
    """Also those that have no node yet; the launcher's command line keeps its quotes."""
    import shlex

    options = yaml.safe_load(files["aws.yaml"])["docker"]["run_options"]
    arguments = shlex.split(" ".join(options))
    (declared,) = (argument.split("=", 1)[1] for argument in arguments if argument.startswith(NODE_GROUPS_VARIABLE))
    assert json.loads(declared)["train"] == {"cpus": 16, "gpus": 1, "max": 16}
    for name, document in documents(files):
        if name.startswith("kuberay") and document["kind"] in ("RayCluster", "RayJob"):
            pods = [value for key, value in everything_in(document) if key == "env"]
            assert len(pods) == 1 + len(description.groups)
            assert all(NODE_GROUPS_VARIABLE in {variable["name"] for variable in pod} for pod in pods)


def test_queues_are_resources_of_the_head(files: dict[str, str], description: ClusterDescription) -> None:
    (cluster,) = (document for _, document in documents(files) if isinstance(document, dict) and document.get("kind") == "RayCluster")
    assert cluster["spec"]["headGroupSpec"]["resources"] == {"CPU": "0", "queue:research": "8", "queue:production": "16"}
    assert description.kubernetes is not None
    options = description.kubernetes.model_dump() | {"local_queue": "team", "priority_class": "low"}
    (job,) = yaml.safe_load_all(render(changed(description, kubernetes=options))["kuberay/job.yaml"])
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "low"


def test_nothing_is_open_to_the_world(files: dict[str, str]) -> None:
    """Dashboard, control plane and endpoint are reached through SSH or a named client; SSH from administrators only."""
    assert not [name for name, text in files.items() if "0.0.0.0" in text or "::/0" in text]
    for name, document in documents(files):
        for key, value in everything_in(document):
            assert key not in ("LoadBalancer", "NodePort", "hostNetwork", "hostPort", "privileged", "ingress_options"), name
            if key in ("serviceType", "type"):
                assert value not in ("LoadBalancer", "NodePort"), name
    for cloud in ("aws", "gcp"):
        (start,) = (line for line in yaml.safe_load(files[f"{cloud}.yaml"])["head_start_ray_commands"] if "ray start" in line)
        assert "--dashboard-host=127.0.0.1" in start
    groups = [kind["node_config"] for kind in yaml.safe_load(files["aws.yaml"])["available_node_types"].values()]
    assert all(node["SecurityGroupIds"] for node in groups), "Ray would make a group that lets everybody in by SSH"


def test_secrets_are_only_referred_to(files: dict[str, str]) -> None:
    for name, document in documents(files):
        for key, value in everything_in(document):
            if key == "env":
                assert not [v for v in value if re.search("SECRET|PASSWORD|_KEY|TOKEN", v["name"]) and "value" in v], name
    assert not [name for name, text in files.items() if re.search(r"\b(?=[A-Za-z+/]*\d)[A-Za-z0-9+/]{32,}\b", text)], (
        "that looks like a key"
    )
    assert yaml.safe_load(files["aws.yaml"])["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


def test_kubernetes_objects_fit_their_schemas(files: dict[str, str]) -> None:
    import kubernetes_validate

    kinds = set()
    for name, document in documents(files):
        if not name.startswith("kuberay"):
            continue
        kinds.add(document["kind"])
        assert document["metadata"]["namespace"] == "eagleray"
        if document["apiVersion"] == "ray.io/v1":
            for template in ray_pods(document):
                pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template}
                kubernetes_validate.validate(pod, "1.31", strict=True)
        else:
            kubernetes_validate.validate(document, "1.31", strict=True)
    assert kinds == {"ServiceAccount", "NetworkPolicy", "PodDisruptionBudget", "RayCluster", "RayJob"}


def ray_pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


CLUSTER_KEYS = {
    "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "authOptions", "headGroupSpec", "workerGroupSpecs",
    "gcsFaultToleranceOptions", "tlsOptions",
}  # fmt: skip
JOB_KEYS = {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "submissionMode", "rayClusterSpec"}
GROUP_KEYS = {"groupName", "replicas", "minReplicas", "maxReplicas", "labels", "rayStartParams", "template"}


def test_rays_objects_have_the_operators_fields(description: ClusterDescription) -> None:
    """Those of the CRDs of KubeRay 1.7 that are used; `template`, `groupName` and the numbers of replicas are required there."""
    assert description.kubernetes is not None
    options = description.kubernetes.model_dump() | {"redis_address": "redis:6379", "redis_secret": "redis", "tls": True}
    files = render(changed(description, kubernetes=options))
    (cluster,) = (document for name, document in documents(files) if name == "kuberay/cluster.yaml" and document["kind"] == "RayCluster")
    (job,) = (document for _, document in documents(files) if isinstance(document, dict) and document.get("kind") == "RayJob")
    assert set(cluster["spec"]) == CLUSTER_KEYS and set(job["spec"]) == JOB_KEYS and set(job["spec"]["rayClusterSpec"]) == CLUSTER_KEYS
    for group in cluster["spec"]["workerGroupSpecs"]:
        assert set(group) == GROUP_KEYS
    secret = {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}}
    assert cluster["spec"]["gcsFaultToleranceOptions"] == {"redisAddress": "redis://redis:6379", "redisPassword": secret}
    assert cluster["spec"]["authOptions"] == {"mode": "token"}


def test_pods_have_no_more_rights_than_they_need(files: dict[str, str]) -> None:
    for name, document in documents(files):
        for template in ray_pods(document) if isinstance(document, dict) and document.get("apiVersion") == "ray.io/v1" else []:
            pod = template["spec"]
            assert pod["securityContext"]["runAsNonRoot"], name
            for container in pod["containers"]:
                assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_gpu_nodes_are_for_those_that_need_them(files: dict[str, str]) -> None:
    (cluster,) = (document for _, document in documents(files) if isinstance(document, dict) and document.get("kind") == "RayCluster")
    groups = {group["groupName"]: group["template"]["spec"] for group in cluster["spec"]["workerGroupSpecs"]}
    limits = {name: pod["containers"][0]["resources"]["limits"] for name, pod in groups.items()}
    assert {name: limit.get("nvidia.com/gpu") for name, limit in limits.items()} == {"decode": None, "train": "1", "serve": None}
    assert groups["train"]["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    assert groups["decode"]["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert "nodeSelector" not in groups["serve"] and "tolerations" not in groups["serve"]
    assert "preferredDuringSchedulingIgnoredDuringExecution" in groups["train"]["affinity"]["nodeAffinity"], "spot first, on demand else"


def allowed(policy: dict[str, Any], action: str, bucket: str, key: str) -> bool:
    """Tell whether a policy lets someone do this to an object (key) or list a prefix."""
    from fnmatch import fnmatchcase

    target = f"arn:aws:s3:::{bucket}" + ("" if action == "s3:ListBucket" else f"/{key}")
    for statement in policy["Statement"]:
        prefixes = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix")
        fits = action in statement["Action"] and fnmatchcase(target, statement["Resource"])
        if fits and (prefixes is None or any(fnmatchcase(key, prefix) for prefix in prefixes)):
            return True
    return False


def test_rights_on_the_bucket_are_as_narrow_as_the_verbs(files: dict[str, str]) -> None:
    ingest, train, serve = (json.loads(files[f"policies/{verb}.json"]) for verb in ("ingest", "train", "serve"))
    shard, checkpoint, model, outcome = (
        "data/train/0.parquet",
        "eagleray/runs/a/0",
        "eagleray/models/m/1/card.json",
        "eagleray/experiments/m/1",
    )
    assert allowed(ingest, "s3:PutObject", "my-bucket", shard) and not allowed(ingest, "s3:GetObject", "my-bucket", checkpoint)
    assert allowed(train, "s3:GetObject", "my-bucket", shard) and not allowed(train, "s3:PutObject", "my-bucket", shard)
    assert allowed(train, "s3:PutObject", "my-bucket", checkpoint) and allowed(train, "s3:ListBucket", "my-bucket", "data/train")
    assert allowed(serve, "s3:GetObject", "my-bucket", model) and not allowed(serve, "s3:PutObject", "my-bucket", model)
    assert allowed(serve, "s3:PutObject", "my-bucket", outcome) and not allowed(serve, "s3:GetObject", "my-bucket", checkpoint)
    for policy in (ingest, train, serve):
        assert not allowed(policy, "s3:GetObject", "another-bucket", shard) and not allowed(policy, "s3:GetObject", "my-bucket", "x")
        assert not allowed(policy, "s3:ListBucket", "my-bucket", "private/x")


def test_the_cheapest_machine_of_the_shape_is_taken(description: ClusterDescription) -> None:
    types = yaml.safe_load(render(description)["aws.yaml"])["available_node_types"]
    assert types["train"]["node_config"]["InstanceType"] == "g6.4xlarge"
    own = {"aws": {"our-own": {"cpus": 24, "memory_gb": 64, "gpus": 1, "gpu": "L4", "usd_per_hour": 0.01}}}
    types = yaml.safe_load(render(changed(description, machines=own))["aws.yaml"])["available_node_types"]
    assert types["train"]["node_config"]["InstanceType"] == "our-own" and types["train"]["resources"] == {"CPU": 24, "GPU": 1}
    assert types["train-spot"]["node_config"]["InstanceType"] == "g6.4xlarge", "no spot price, no spot node"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grupos": {}}, r"unknown key 'grupos' .did you mean 'groups'\?"),
        ({"head": {"cpus": 8, "memory": 32}}, r"unknown key 'head.memory' .did you mean 'memory_gb'"),
        ({"groups": {"trian": {"cpus": 1, "memory_gb": 1, "max": 1}}}, "groups"),
        ({"groups": {"train": {"cpus": 8, "memory_gb": 32, "gpus": 1, "max": 4}}}, "gpus and gpu go together"),
        ({"groups": {"train": {"cpus": 8, "memory_gb": 32, "min": 5, "max": 4}}}, "min: 5 is more than max: 4"),
        ({"data_uri": "/data"}, "'/data' is not an s3:// URI; nodes do not share a disk"),
        (
            {"groups": {"train": {"cpus": 8, "memory_gb": 32, "gpus": 3, "gpu": "L4", "max": 4}}},
            r"groups.train: no machine of aws has .* 3 × L4",
        ),
        ({"aws": None, "gcp": None, "kubernetes": None}, "none of the sections aws, gcp and kubernetes"),
        ({"aws": {"region": "us-west-2", "security_group": "default", "head_profile": "a", "worker_profile": "b"}}, "aws.security_group"),
    ],
)
def test_a_description_that_cannot_be_is_refused(description: ClusterDescription, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render(changed(description, **values))
