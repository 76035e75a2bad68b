"""A cluster as objects for Kubernetes with the KubeRay operator."""

from __future__ import annotations

import json
from typing import Any

from eagleray.cluster.description import ClusterDescription, Group, Kubernetes, Shape
from eagleray.placement import GROUP_LABEL, QUEUE_PREFIX, node_environment

JOB_CONFIG = "eagleray-job"
GRACE_S = 110
"""Time of a pod from the notice that it must go to its end; clouds give spot nodes two minutes at most, some only 30 s."""

OPERATOR_NAMESPACE = "kuberay-operator"
_DASHBOARD, _SERVE, _GCS = 8265, 8000, 6379


def render_kuberay(description: ClusterDescription, options: Kubernetes, ray_version: str) -> dict[str, list[dict[str, Any]]]:
    """Return the objects by file: `cluster` stays, and is for submitted jobs and serving; `job` has a cluster of its own."""
    shared = [_service_account(description, options), _network_policy(description, options), _disruption_budget(description, options)]
    spec = _cluster_spec(description, options, ray_version)
    job = _object("ray.io/v1", "RayJob", f"{description.name}-job", options)
    if options.local_queue is not None:
        job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = options.local_queue
    if options.priority_class is not None:
        job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] = options.priority_class
    return {
        "cluster": [*shared, _object("ray.io/v1", "RayCluster", description.name, options) | {"spec": spec}],
        "job": [
            job
            | {
                "spec": {
                    "entrypoint": "eagleray train /etc/eagleray/job.yaml",
                    "shutdownAfterJobFinishes": True,
                    "ttlSecondsAfterFinished": description.idle_timeout_s,
                    "submissionMode": "K8sJobMode",
                    "rayClusterSpec": _with_job_file(spec),
                }
            }
        ],
    }


def _object(version: str, kind: str, name: str, options: Kubernetes) -> dict[str, Any]:
    labels = {"app.kubernetes.io/part-of": "eagleray"}
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": options.namespace, "labels": labels}}


def _service_account(description: ClusterDescription, options: Kubernetes) -> dict[str, Any]:
    return _object("v1", "ServiceAccount", options.service_account, options) | {"automountServiceAccountToken": False}


def _network_policy(description: ClusterDescription, options: Kubernetes) -> dict[str, Any]:
    """Pods of the cluster talk to each other; others reach the job server and the endpoint only where they are labelled for it."""
    nodes = {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    operator = {"matchLabels": {"kubernetes.io/metadata.name": OPERATOR_NAMESPACE}}
    clients = {"matchLabels": {"eagleray.io/client": "true"}}
    ports = [{"protocol": "TCP", "port": port} for port in (_DASHBOARD, _SERVE)]
    return _object("networking.k8s.io/v1", "NetworkPolicy", description.name, options) | {
        "spec": {
            "podSelector": nodes,
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": nodes}]},
                {"from": [{"podSelector": clients}, {"namespaceSelector": operator}], "ports": ports},
            ],
        }
    }


def _disruption_budget(description: ClusterDescription, options: Kubernetes) -> dict[str, Any]:
    """Nobody drains the head, or the last nodes that serve, on purpose; training gets over it."""
    selector = {
        "matchLabels": {"ray.io/cluster": description.name},
        "matchExpressions": [{"key": "ray.io/group", "operator": "In", "values": ["headgroup", "serve"]}],
    }
    return _object("policy/v1", "PodDisruptionBudget", description.name, options) | {"spec": {"maxUnavailable": 0, "selector": selector}}


def _cluster_spec(description: ClusterDescription, options: Kubernetes, ray_version: str) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "rayVersion": ray_version,
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": description.idle_timeout_s, "upscalingMode": "Default"},
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": {"num-cpus": "0"},
            "resources": {"CPU": "0"} | {f"{QUEUE_PREFIX}{name}": str(workers) for name, workers in description.queues.items()},
            "template": _pod(description, options, description.head, "head"),
        },
        "workerGroupSpecs": [_worker_group(description, options, name, group) for name, group in description.groups.items()],
    }
    if options.redis_address is not None:
        redis: dict[str, Any] = {"redisAddress": f"redis://{options.redis_address}"}
        if options.redis_secret is not None:
            redis["redisPassword"] = {"valueFrom": {"secretKeyRef": {"name": options.redis_secret, "key": "password"}}}
        spec["gcsFaultToleranceOptions"] = redis
    if options.tls:
        spec["tlsOptions"] = {"enabled": True}
    return spec


def _worker_group(description: ClusterDescription, options: Kubernetes, name: str, group: Group) -> dict[str, Any]:
    return {
        "groupName": name,
        "replicas": group.min,
        "minReplicas": group.min,
        "maxReplicas": group.max,
        "labels": {GROUP_LABEL: name},
        "rayStartParams": {},
        "template": _pod(description, options, group, "worker"),
    }


def _pod(description: ClusterDescription, options: Kubernetes, shape: Shape, kind: str) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "serviceAccountName": options.service_account,
        "terminationGracePeriodSeconds": GRACE_S,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [_container(description, options, shape, kind)],
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{max(1, shape.memory_gb * 3 // 10)}Gi"}},
            {"name": "ray", "emptyDir": {}},
        ],
    }
    if kind == "head":
        # The autoscaler beside the head starts and ends pods; KubeRay gives it an account of its own for that.
        del spec["serviceAccountName"]
    return {"spec": spec | _node_choice(options, shape)}


def _container(description: ClusterDescription, options: Kubernetes, shape: Shape, kind: str) -> dict[str, Any]:
    size = {"cpu": str(shape.cpus), "memory": f"{shape.memory_gb}Gi"} | ({"nvidia.com/gpu": str(shape.gpus)} if shape.gpus else {})
    groups = json.dumps({name: {"cpus": group.cpus, "gpus": group.gpus, "max": group.max} for name, group in description.groups.items()})
    container: dict[str, Any] = {
        "name": f"ray-{kind}",
        "image": description.image,
        "env": [{"name": name, "value": value} for name, value in node_environment(groups).items()],
        "resources": {"requests": size, "limits": size},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "ray", "mountPath": "/tmp/ray"}],
    }
    if options.s3_secret is not None:
        container["envFrom"] = [{"secretRef": {"name": options.s3_secret}}]
    if kind == "head":
        names = {"gcs-server": _GCS, "dashboard": _DASHBOARD, "serve": _SERVE}
        container["ports"] = [{"name": name, "containerPort": port} for name, port in names.items()]
    else:
        # A pod that must go tells Ray first, so that training saves a checkpoint while the node is still there.
        notice = f"eagleray cluster drain --address $RAY_ADDRESS --deadline-s {GRACE_S - 10} "
        container["lifecycle"] = {"preStop": {"exec": {"command": ["/bin/sh", "-c", notice]}}}
    return container


def _node_choice(options: Kubernetes, shape: Shape) -> dict[str, Any]:
    """Return on which nodes a pod may be: GPU and spot nodes by their labels, with the taints that they have."""
    selector = dict(options.gpu_node_selector.get(shape.gpu or "", {}))
    tolerations: list[dict[str, Any]] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}] if shape.gpus else []
    choice: dict[str, Any] = {}
    market = shape.market if isinstance(shape, Group) else "on-demand"
    if market != "on-demand":
        tolerations += [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in options.spot_node_selector]
    if market == "spot":
        selector |= options.spot_node_selector
    elif market == "spot-then-on-demand" and options.spot_node_selector:
        terms = [{"key": key, "operator": "In", "values": [value]} for key, value in options.spot_node_selector.items()]
        preferred = [{"weight": 100, "preference": {"matchExpressions": terms}}]
        choice["affinity"] = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}
    if selector:
        choice["nodeSelector"] = selector
    if tolerations:
        choice["tolerations"] = tolerations
    return choice


def _with_job_file(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the cluster with the job file, a ConfigMap, in its head."""
    head = spec["headGroupSpec"]
    pod = head["template"]["spec"]
    container = pod["containers"][0]
    mounts = [*container["volumeMounts"], {"name": "job", "mountPath": "/etc/eagleray", "readOnly": True}]
    volumes = [*pod["volumes"], {"name": "job", "configMap": {"name": JOB_CONFIG}}]
    changed = pod | {"containers": [container | {"volumeMounts": mounts}], "volumes": volumes}
    return spec | {"headGroupSpec": head | {"template": {"spec": changed}}}
