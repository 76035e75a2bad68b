"""What a job will cost, against what others measured, and by arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

from eagleray.cluster.description import ClusterDescription, load_description
from eagleray.cluster.estimate import estimate_cost
from eagleray.config.load import load_job
from eagleray.config.schema import ModelConfig
from eagleray.errors import ConfigError
from eagleray.models.size import network_size

IMAGENET = {"num_classes": 1000, "train_pictures": 1_281_167, "val_pictures": 50_000}


@pytest.fixture(scope="module")
def description(repository: Path) -> ClusterDescription:
    return load_description(repository / "cluster" / "cluster.yaml")


def with_train(description: ClusterDescription, **group: object) -> ClusterDescription:
    train = description.groups["train"].model_copy(update=group)
    return description.model_copy(update={"groups": {"train": train}})


@pytest.mark.parametrize(
    ("name", "size", "gigaflops"),
    [("resnet50", 224, 2 * 4.09), ("vit_b_16", 224, 2 * 17.56), ("inception_v3", 299, 2 * 5.71), ("regnet_y_400mf", 224, 2 * 0.40)],
)
def test_work_is_what_torchvision_says(name: str, size: int, gigaflops: float) -> None:
    """torchvision's table of models counts multiply-adds, attention's own products left out (ViT: 17.56)."""
    assert network_size(ModelConfig(name=name), 1000, size).flops / 1e9 == pytest.approx(gigaflops, rel=0.05)


def test_a_recipe_with_a_published_time_is_estimated_near_it(repository: Path, description: ClusterDescription) -> None:
    """FFCV: 16 epochs of ResNet-50, training pictures that grow, in 14.9 minutes on 8 A100."""
    job = load_job(repository / "jobs" / "train_resnet50_16_epochs_imagenet.yaml")
    found = estimate_cost(job, with_train(description, cpus=96, gpus=8, gpu="A100"), "aws", **IMAGENET)
    assert found.nodes == 1 and found.machine == "p4d.24xlarge"
    assert 60 * found.hours == pytest.approx(14.9, rel=0.25)
    assert found.usd == pytest.approx(found.hours * (21.96 + 0.4032)) and found.spot_usd is not None and found.spot_usd < found.usd


def test_a_measured_speed_takes_the_place_of_the_assumption(repository: Path, description: ClusterDescription) -> None:
    job = load_job(repository / "jobs" / "train_resnet50_imagenet.yaml")
    found = estimate_cost(job, description, "aws", num_classes=1000, train_pictures=1000, val_pictures=0, images_per_s=100)
    assert found.is_measured and found.images_per_s == pytest.approx(100)
    assert found.worker_hours == pytest.approx(job.train.epochs * 1000 / 100 / 3600)
    assert found.hours == pytest.approx(found.worker_hours / job.train.max_workers)


def test_a_search_costs_at_most_all_its_trials(repository: Path, description: ClusterDescription) -> None:
    job = load_job(repository / "jobs" / "quickstart.yaml", ["tune.num_trials=6", "tune.max_concurrent=2", "tune.epochs=4"])
    numbers = {"num_classes": 10, "train_pictures": 1000, "val_pictures": 0, "images_per_s": 10}
    found = estimate_cost(job, description, "gcp", **numbers)
    assert (found.trials, found.workers, found.nodes) == (6, 2, 2)
    assert found.worker_hours == pytest.approx(6 * 4 * 1000 / 10 / 3600) and found.hours == pytest.approx(found.worker_hours / 2)


def test_what_cannot_be_estimated_is_named(repository: Path, description: ClusterDescription) -> None:
    job = load_job(repository / "jobs" / "train_resnet50_imagenet.yaml")
    with pytest.raises(ConfigError, match=r"groups.train.max: 4 node\(s\) hold 4 worker\(s\), the job has 8"):
        estimate_cost(job, with_train(description, max=4), "aws", **IMAGENET)
    with pytest.raises(ConfigError, match=r"groups.train.gpu none: its speed is not known; .*--images-per-second"):
        estimate_cost(job, with_train(description, gpus=0, gpu=None), "aws", **IMAGENET)
    with pytest.raises(ConfigError, match="there is no `train`"):
        estimate_cost(job, description.model_copy(update={"groups": {}}), "aws", **IMAGENET)
