"""From a cluster description to the files that clouds take: Ray's cluster launcher (AWS, GCP), KubeRay, and S3 policies."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from importlib import metadata
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import yaml

from eagleray.cluster.description import Cloud, ClusterDescription, Group, Shape
from eagleray.cluster.kuberay import render_kuberay
from eagleray.errors import ConfigError
from eagleray.placement import GROUP_LABEL, QUEUE_PREFIX, node_environment

HEADER = "# Rendered by `eagleray cluster render` from the cluster's description: change that, and render again.\n"
TOKEN_FILE = "~/.ray/auth_token"
SPOT_PRIORITY = 1
"""Ray's autoscaler takes the type of higher priority first, and another one while that has lately failed to start."""


class NodeType(NamedTuple):
    """A kind of node of the launcher's: a group, bought in one way."""

    name: str
    group: str
    shape: Group
    is_spot: bool


def render(description: ClusterDescription) -> dict[str, str]:
    """Return the text of each file by its path: those for the clouds that the description speaks of, and S3 policies.

    Raises:
        ConfigError: a cloud has no machine of the wanted shape, or no cloud is described.
    """
    if description.aws is None and description.gcp is None and description.kubernetes is None:
        raise ConfigError("the cluster description has none of the sections aws, gcp and kubernetes; add one, see cluster/cluster.yaml")
    files: dict[str, str] = {}
    if description.aws is not None:
        files["aws.yaml"] = HEADER + _yaml(_launcher(description, "aws"))
        files["aws-account.yaml"] = HEADER + _yaml(aws_account(description))
    if description.gcp is not None:
        files["gcp.yaml"] = HEADER + _yaml(_launcher(description, "gcp"))
    if description.kubernetes is not None:
        for name, objects in render_kuberay(description, description.kubernetes, metadata.version("ray")).items():
            files[f"kuberay/{name}.yaml"] = HEADER + "---\n".join(_yaml(value) for value in objects)
    for verb, policy in s3_policies(description).items():
        files[f"policies/{verb}.json"] = json.dumps(policy, indent=2) + "\n"
    return files


def _yaml(document: dict[str, Any]) -> str:
    return yaml.safe_dump(document, sort_keys=False, width=140)


# --- Ray's cluster launcher ------------------------------------------------------------------------------------


def _launcher(description: ClusterDescription, cloud: Cloud) -> dict[str, Any]:
    node_types = list(_node_types(description))
    environment = {"RAY_AUTH_MODE": "token"} | node_environment(node_groups(description, cloud))
    start = "ulimit -n 65536; RAY_enable_autoscaler_v2=1 ray start"
    return {
        "cluster_name": description.name,
        "max_workers": sum(node_type.shape.max for node_type in node_types),
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": description.idle_timeout_s / 60,
        "provider": _provider(description, cloud),
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": description.image,
            "container_name": description.name,
            "pull_before_run": True,
            "run_options": ["--ulimit nofile=65536:65536", *(f"-e {name}={shlex.quote(value)}" for name, value in environment.items())],
        },
        "file_mounts": {TOKEN_FILE: TOKEN_FILE},  # every node asks for the token of whoever runs `ray up`
        "available_node_types": {
            "head": {
                "resources": {"CPU": 0} | queue_resources(description),
                "node_config": _node_config(description, cloud, description.head, "head"),
            },
            **{node_type.name: _worker_type(description, cloud, node_type) for node_type in node_types},
        },
        "head_node_type": "head",
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        # The dashboard stays on the head's loopback; `ray dashboard` and `ray attach` go through SSH.
        "head_start_ray_commands": [
            "ray stop",
            f"{start} --head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            f"{start} --address=$RAY_HEAD_IP:6379",
            f"nohup eagleray cluster watch-notices --address $RAY_HEAD_IP:6379 --cloud {cloud} > /tmp/ray/notices.log 2>&1 &",
        ],
    }


def queue_resources(description: ClusterDescription) -> dict[str, int]:
    """Return the logical resources of the head that stand for the queues."""
    return {f"{QUEUE_PREFIX}{name}": workers for name, workers in description.queues.items()}


def node_groups(description: ClusterDescription, cloud: Cloud) -> str:
    """Return what the nodes are told of the cluster's groups, see `eagleray.placement`."""
    machines = description.known_machines(cloud)
    groups = {}
    for name, shape in description.groups.items():
        machine = machines[description.machine(cloud, shape, f"groups.{name}", is_spot=shape.market != "on-demand")]
        groups[name] = {"cpus": machine.cpus, "gpus": machine.gpus, "max": shape.max}
    return json.dumps(groups)


def _provider(description: ClusterDescription, cloud: Cloud) -> dict[str, Any]:
    if cloud == "aws":
        assert description.aws is not None
        return {"type": "aws", "region": description.aws.region, "cache_stopped_nodes": False}
    assert description.gcp is not None
    zone = description.gcp.zone
    return {"type": "gcp", "project_id": description.gcp.project, "region": zone.rpartition("-")[0], "availability_zone": zone}


def _node_types(description: ClusterDescription) -> Iterator[NodeType]:
    for name, group in description.groups.items():
        if group.market != "on-demand":
            yield NodeType(f"{name}-spot" if group.market == "spot-then-on-demand" else name, name, group, True)
        if group.market != "spot":
            yield NodeType(name, name, group, False)


def _worker_type(description: ClusterDescription, cloud: Cloud, node_type: NodeType) -> dict[str, Any]:
    _, group, shape, is_spot = node_type
    is_fallback = shape.market == "spot-then-on-demand" and not is_spot
    key = f"groups.{group}"
    machine = description.known_machines(cloud)[description.machine(cloud, shape, key, is_spot=is_spot)]
    return {
        "min_workers": 0 if is_fallback else shape.min,
        "max_workers": shape.max,
        "priority": SPOT_PRIORITY if is_spot else 0,
        "resources": {"CPU": machine.cpus} | ({"GPU": machine.gpus} if machine.gpus else {}),
        "labels": {GROUP_LABEL: group},
        "node_config": _node_config(description, cloud, shape, key, is_spot),
    }


def _node_config(description: ClusterDescription, cloud: Cloud, shape: Shape, key: str, is_spot: bool = False) -> dict[str, Any]:
    machine = description.machine(cloud, shape, key, is_spot=is_spot)
    is_head = shape is description.head
    if cloud == "aws":
        return _aws_node(description, machine, is_head, is_spot)
    return _gcp_node(description, machine, is_head, is_spot, bool(shape.gpus))


def _aws_node(description: ClusterDescription, machine: str, is_head: bool, is_spot: bool) -> dict[str, Any]:
    aws = description.aws
    assert aws is not None
    config: dict[str, Any] = {
        "InstanceType": machine,
        "SecurityGroupIds": [aws.security_group],
        "IamInstanceProfile": {"Name": aws.head_profile if is_head else aws.worker_profile},
        "BlockDeviceMappings": [
            {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": description.head.disk_gb, "VolumeType": "gp3", "Encrypted": True}}
        ],
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
    }
    if aws.subnets:
        config["SubnetIds"] = aws.subnets
    if aws.image_id is not None:
        config["ImageId"] = aws.image_id
    if is_spot:
        config["InstanceMarketOptions"] = {"MarketType": "spot"}
    return config


def _gcp_node(description: ClusterDescription, machine: str, is_head: bool, is_spot: bool, has_gpu: bool) -> dict[str, Any]:
    gcp = description.gcp
    assert gcp is not None
    boot = {"diskSizeGb": description.head.disk_gb, "sourceImage": gcp.disk_image}
    config: dict[str, Any] = {
        "machineType": machine,
        "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": boot}],
        "serviceAccounts": [
            {
                "email": gcp.head_service_account if is_head else gcp.worker_service_account,
                "scopes": ["https://www.googleapis.com/auth/cloud-platform"],
            }
        ],
        "metadata": {"items": [{"key": "install-nvidia-driver", "value": "True"}]} if has_gpu else {"items": []},
    }
    scheduling: dict[str, Any] = {"onHostMaintenance": "TERMINATE"} if has_gpu or is_spot else {}
    if is_spot:
        scheduling |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE", "automaticRestart": False}
    return config | ({"scheduling": scheduling} if scheduling else {})


# --- Rights ----------------------------------------------------------------------------------------------------


def s3_policies(description: ClusterDescription) -> dict[str, dict[str, Any]]:
    """Return an IAM policy for each verb: what `ingest`, `train` (with `tune`) and `serve` need of the buckets, and no more."""
    data, workspace = description.data_uri, description.workspace_uri
    read, change = ["s3:GetObject"], ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    return {
        "ingest": _policy((data, change)),
        "train": _policy((data, read), (workspace, change)),
        "serve": _policy((f"{workspace}/models", read), (f"{workspace}/experiments", change)),
    }


def _policy(*grants: tuple[str, list[str]]) -> dict[str, Any]:
    statements: list[dict[str, Any]] = []
    for uri, actions in grants:
        bucket, prefix = urlsplit(uri).netloc, urlsplit(uri).path.strip("/")
        within = f"{prefix}/*" if prefix else "*"
        statements.append({"Effect": "Allow", "Action": actions, "Resource": f"arn:aws:s3:::{bucket}/{within}"})
        listing: dict[str, Any] = {"Effect": "Allow", "Action": ["s3:ListBucket"], "Resource": f"arn:aws:s3:::{bucket}"}
        if prefix:
            listing["Condition"] = {"StringLike": {"s3:prefix": [prefix, within]}}
        statements.append(listing)
    return {"Version": "2012-10-17", "Statement": statements}


def aws_account(description: ClusterDescription) -> dict[str, Any]:
    """Return a CloudFormation template for what must be there before the first node: the firewall and two roles."""
    aws = description.aws
    assert aws is not None
    policies = s3_policies(description)
    storage = {"PolicyName": "storage", "PolicyDocument": _merged(policies["ingest"], policies["train"])}
    return {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": f"Firewall and roles of the eagleray cluster '{description.name}'",
        "Parameters": {
            "Vpc": {"Type": "AWS::EC2::VPC::Id", "Description": "Network of the cluster"},
            "AdminCidr": {"Type": "String", "Description": "Addresses from which administrators use SSH, such as 203.0.113.7/32"},
        },
        "Resources": {
            "Nodes": {
                "Type": "AWS::EC2::SecurityGroup",
                "Properties": {
                    "GroupDescription": "Nodes of the cluster: SSH from administrators, all else among themselves only",
                    "VpcId": {"Ref": "Vpc"},
                    "SecurityGroupIngress": [{"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "CidrIp": {"Ref": "AdminCidr"}}],
                },
            },
            "AmongNodes": {
                "Type": "AWS::EC2::SecurityGroupIngress",
                "Properties": {
                    "GroupId": {"Fn::GetAtt": ["Nodes", "GroupId"]},
                    "IpProtocol": "-1",
                    "SourceSecurityGroupId": {"Fn::GetAtt": ["Nodes", "GroupId"]},
                },
            },
            "HeadRole": _role(aws.head_profile, [storage, {"PolicyName": "nodes", "PolicyDocument": _node_policy(description)}]),
            "WorkerRole": _role(aws.worker_profile, [storage]),
            "HeadProfile": _profile(aws.head_profile, "HeadRole"),
            "WorkerProfile": _profile(aws.worker_profile, "WorkerRole"),
        },
        "Outputs": {"SecurityGroup": {"Description": "For aws.security_group", "Value": {"Fn::GetAtt": ["Nodes", "GroupId"]}}},
    }


def _node_policy(description: ClusterDescription) -> dict[str, Any]:
    """Start nodes, and end those of this cluster."""
    ours = {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": description.name}}
    look = ["ec2:DescribeInstances", "ec2:DescribeInstanceTypes", "ec2:DescribeSubnets", "ec2:DescribeImages", "ec2:DescribeKeyPairs"]
    return {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Action": [*look, "ec2:RunInstances"], "Resource": "*"},
            {
                "Effect": "Allow",
                "Action": ["ec2:CreateTags"],
                "Resource": "*",
                "Condition": {"StringEquals": {"ec2:CreateAction": "RunInstances"}},
            },
            {
                "Effect": "Allow",
                "Action": ["ec2:TerminateInstances", "ec2:CreateTags"],
                "Resource": "*",
                "Condition": ours,
            },
            {"Effect": "Allow", "Action": ["iam:PassRole"], "Resource": {"Fn::GetAtt": ["WorkerRole", "Arn"]}},
        ],
    }


def _merged(*policies: dict[str, Any]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": [statement for policy in policies for statement in policy["Statement"]]}


def _role(name: str, policies: list[dict[str, Any]]) -> dict[str, Any]:
    trust = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
    document = {"Version": "2012-10-17", "Statement": [trust]}
    return {"Type": "AWS::IAM::Role", "Properties": {"RoleName": name, "AssumeRolePolicyDocument": document, "Policies": policies}}


def _profile(name: str, role: str) -> dict[str, Any]:
    return {"Type": "AWS::IAM::InstanceProfile", "Properties": {"InstanceProfileName": name, "Roles": [{"Ref": role}]}}
