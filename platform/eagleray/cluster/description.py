"""A cluster in a few lines, for any cloud: what `eagleray cluster render` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from eagleray.config.load import load_section
from eagleray.config.schema import PositiveFloat, PositiveInt, Section, Uri
from eagleray.errors import ConfigError

GroupName = Literal["decode", "train", "serve"]
Cloud = Literal["aws", "gcp"]
Market = Literal["on-demand", "spot", "spot-then-on-demand"]
"""How machines are bought; `spot-then-on-demand` takes on-demand ones while no spot ones are to be had."""

_CATALOGUE = Path(__file__).with_name("machines.yaml")


class Shape(Section):
    """What a machine has, or must have."""

    cpus: PositiveInt
    """Virtual CPUs."""

    memory_gb: PositiveInt

    gpus: Annotated[int, Field(ge=0)] = 0

    gpu: str | None = None
    """Kind of its GPUs, as in the table of machines: T4, L4, A10G, A100, H100."""

    @model_validator(mode="after")
    def _gpus_have_a_kind(self) -> Shape:
        if bool(self.gpus) != (self.gpu is not None):
            raise ValueError("gpus and gpu go together: how many, and which (`gpus: 1, gpu: L4`)")
        return self


class Machine(Shape):
    """A machine that a cloud offers."""

    usd_per_hour: PositiveFloat
    spot_usd_per_hour: PositiveFloat | None = None
    """None: not to be had as spot."""


class Head(Shape):
    """The node that runs the control plane, job drivers and the dashboard, and no other work."""

    disk_gb: PositiveInt = 100


class Group(Shape):
    """Worker nodes of one kind."""

    min: Annotated[int, Field(ge=0)] = 0
    """Nodes that are always there, idle or not."""

    max: PositiveInt
    """Nodes at most."""

    market: Market = "on-demand"

    @model_validator(mode="after")
    def _max_holds_min(self) -> Group:
        if self.min > self.max:
            raise ValueError(f"min: {self.min} is more than max: {self.max}")
        return self


class Aws(Section):
    region: str
    security_group: Annotated[str, Field(pattern=r"^sg-[0-9a-f]+$")]
    """Id of the nodes' security group. Ray would make one that lets the world in by SSH, so it must be given."""

    head_profile: str
    """Name of the head's instance profile: may start and end nodes."""

    worker_profile: str
    """Name of the other nodes' instance profile: may read and write the buckets."""

    subnets: list[str] = Field(default_factory=list)
    """Ids; by default the default VPC's."""

    image_id: str | None = None
    """AMI with Docker and NVIDIA's driver; by default Ray's choice for the region, a Deep Learning AMI."""


class Gcp(Section):
    project: str
    zone: Annotated[str, Field(pattern=r"^[a-z]+-[a-z]+\d+-[a-z]$")]
    head_service_account: str
    """May start and end nodes, and act as the workers' account."""

    worker_service_account: str
    disk_image: str
    """Image or image family with Docker and NVIDIA's driver."""


class Kubernetes(Section):
    """For the KubeRay operator, from version 1.6 on."""

    namespace: str = "eagleray"
    service_account: str = "eagleray"
    """Account of the pods; without rights of its own on the cluster."""

    s3_secret: str | None = None
    """Secret whose keys become environment variables; None where the service account has a role of the cloud's."""

    redis_address: str | None = None
    """`host:6379` of a Redis that keeps the control plane's state: a new head then takes over from a lost one."""

    redis_secret: str | None = None
    """Secret with the key `password` for that Redis."""

    local_queue: str | None = None
    """Queue of Kueue's for the cluster of `job.yaml`: it starts when Kueue's quotas and priorities let it."""

    priority_class: str | None = None
    """Kueue's priority class for it."""

    tls: bool = False
    """Encrypt between nodes; needs cert-manager, and KubeRay from 1.7 on with its feature gate RayClusterMTLS."""

    gpu_node_selector: dict[str, dict[str, str]] = Field(default_factory=dict)
    """By kind of GPU, the labels of nodes that have it; where there is none, any node with a GPU will do."""

    spot_node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of spot nodes; pods on them tolerate taints of the same keys."""

    @model_validator(mode="after")
    def _secret_is_for_redis(self) -> Kubernetes:
        if self.redis_secret is not None and self.redis_address is None:
            raise ValueError("redis_secret is of no use without redis_address")
        return self


class ClusterDescription(Section):
    """A cluster: its head, its groups of nodes, and where it may be."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,38}$")]
    image: str
    """Container image, see cluster/images/Dockerfile."""

    data_uri: Uri
    """s3:// folder of the data sets; jobs that train only read it."""

    workspace_uri: Uri
    """s3:// folder of runs, models and experiments (`workspace.root` of job files)."""

    idle_timeout_s: PositiveInt = 300
    """A node without work goes after this time, in seconds."""

    head: Head
    groups: dict[GroupName, Group]
    queues: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")], PositiveInt] = Field(default_factory=dict)
    """By name, how many workers (a GPU each, where there are GPUs) the jobs of a queue may have at a time; the others wait."""

    aws: Aws | None = None
    gcp: Gcp | None = None
    kubernetes: Kubernetes | None = None
    machines: dict[Cloud, dict[str, Machine]] = Field(default_factory=dict)
    """Machines and prices besides, or in place of, those that eagleray knows."""

    @field_validator("data_uri", "workspace_uri")
    @classmethod
    def _is_on_s3(cls, uri: str) -> str:
        if not uri.startswith("s3://"):
            raise ValueError(f"'{uri}' is not an s3:// URI; nodes do not share a disk")
        return uri

    def machine(self, cloud: Cloud, shape: Shape, key: str, *, is_spot: bool = False) -> str:
        """Return the name of the cheapest machine of a cloud that has at least this shape, and just these GPUs.

        Raises:
            ConfigError: there is none; `key` is the setting to name.
        """

        def price(name: str) -> float:
            return (machines[name].spot_usd_per_hour if is_spot else None) or machines[name].usd_per_hour

        machines = self.known_machines(cloud)
        fitting = [name for name, machine in machines.items() if _holds(machine, shape) and (machine.spot_usd_per_hour or not is_spot)]
        if not fitting:
            wanted = f"{shape.cpus} CPUs, {shape.memory_gb} GB" + (f" and {shape.gpus} × {shape.gpu}" if shape.gpus else "")
            kinds = sorted({f"{machine.gpus} × {machine.gpu}" for machine in machines.values() if machine.gpus})
            raise ConfigError(
                f"{key}: no machine of {cloud} has {wanted}{' as spot' if is_spot else ''}; GPUs that are known: {', '.join(kinds)}; "
                f"change the shape, or add a machine under machines.{cloud}"
            )
        return min(fitting, key=price)

    def known_machines(self, cloud: Cloud) -> Mapping[str, Machine]:
        """Return the machines of a cloud by name."""
        return known_machines()[cloud] | self.machines.get(cloud, {})


def known_machines() -> dict[Cloud, dict[str, Machine]]:
    """Return the machines that eagleray knows, by cloud and name."""
    table = yaml.safe_load(_CATALOGUE.read_text())
    return {cloud: {name: Machine(**machine) for name, machine in machines.items()} for cloud, machines in table.items()}


def load_description(path: str | Path) -> ClusterDescription:
    """Read a cluster description.

    Raises:
        ConfigError: the file is missing, no YAML, or says what no cluster can be.
    """
    return load_section(ClusterDescription, path, "cluster description", "cluster/cluster.yaml")


def _holds(machine: Machine, shape: Shape) -> bool:
    return machine.cpus >= shape.cpus and machine.memory_gb >= shape.memory_gb and (machine.gpus, machine.gpu) == (shape.gpus, shape.gpu)
