"""The files for AWS, on a stand-in for its API (moto): what they make is what the description says, and nothing is open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws

from eagleray.cluster.description import ClusterDescription, load_description
from eagleray.cluster.render import render
from eagleray.config.load import build_section

pytestmark = pytest.mark.slow

ADMIN = "203.0.113.7/32"
REGION = "us-west-2"


def account_outputs(template: str) -> dict[str, str]:
    vpc = boto3.client("ec2", REGION).describe_vpcs()["Vpcs"][0]["VpcId"]
    client = boto3.client("cloudformation", REGION)
    parameters = [{"ParameterKey": "Vpc", "ParameterValue": vpc}, {"ParameterKey": "AdminCidr", "ParameterValue": ADMIN}]
    client.create_stack(StackName="eagleray", TemplateBody=template, Parameters=parameters, Capabilities=["CAPABILITY_NAMED_IAM"])
    outputs = client.describe_stacks(StackName="eagleray")["Stacks"][0]["Outputs"]
    return {output["OutputKey"]: output["OutputValue"] for output in outputs}


def image_id() -> str:
    return str(boto3.client("ec2", REGION).describe_images(Owners=["amazon"])["Images"][0]["ImageId"])


def test_rays_launcher_makes_nodes_that_nobody_else_reaches(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private import commands, providers
    from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME, TAG_RAY_USER_NODE_TYPE

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes its SSH key there
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": REGION}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        description = load_description(repository / "cluster" / "cluster.yaml")
        outputs = account_outputs(render(description)["aws-account.yaml"])
        assert description.aws is not None
        values: dict[str, Any] = description.model_dump(mode="json")
        values["aws"] |= {"security_group": outputs["SecurityGroup"], "image_id": image_id()}
        launcher = yaml.safe_load(render(build_section(ClusterDescription, values, "cluster.yaml"))["aws.yaml"])

        config = commands._bootstrap_config(launcher, no_config_cache=True)
        provider = providers._get_node_provider(config["provider"], config["cluster_name"])
        types = config["available_node_types"]
        for name in ("head", "train-spot"):
            tags = {TAG_RAY_USER_NODE_TYPE: name, TAG_RAY_CLUSTER_NAME: "eagleray"}
            provider.create_node_with_resources_and_labels(types[name]["node_config"], tags, 1, types[name]["resources"], {})

        ec2 = boto3.client("ec2", REGION)
        instances = [node for group in ec2.describe_instances()["Reservations"] for node in group["Instances"]]
        assert sorted(node["InstanceType"] for node in instances) == ["g6.4xlarge", "m7i.2xlarge"]
        profiles = {node["InstanceType"]: node["IamInstanceProfile"]["Arn"].rsplit("/", 1)[-1] for node in instances}
        assert profiles == {"m7i.2xlarge": "eagleray-head", "g6.4xlarge": "eagleray-worker"}
        in_use = {group["GroupId"] for node in instances for group in node["SecurityGroups"]}
        assert in_use == {outputs["SecurityGroup"]}
        (group,) = ec2.describe_security_groups(GroupIds=list(in_use))["SecurityGroups"]
        ranges = {entry["CidrIp"] for rule in group["IpPermissions"] for entry in rule["IpRanges"]}
        assert ranges == {ADMIN}, "the launcher has opened nothing"
        own = [pair["GroupId"] for rule in group["IpPermissions"] for pair in rule["UserIdGroupPairs"]]
        assert own == [outputs["SecurityGroup"]]

        provider.terminate_nodes(provider.non_terminated_nodes({}))
        left = ec2.describe_instances(Filters=[{"Name": "instance-state-name", "Values": ["running", "pending"]}])
        assert not left["Reservations"]
