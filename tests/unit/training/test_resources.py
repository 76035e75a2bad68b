"""How CPUs are shared out, and how many workers an elastic run takes."""

from __future__ import annotations

import pytest
from ray.train import ScalingConfig

from eagleray.config.schema import TrainingConfig
from eagleray.errors import TrainingError
from eagleray.training import elastic
from eagleray.training.elastic import Held, beside
from eagleray.training.resources import share_resources, share_what_is_left, validates_beside


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 8, 31])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_workers_and_their_decoding_fit_into_the_cluster(cpus: int, num_workers: int) -> None:
    resources = share_resources({"CPU": cpus}, num_workers, use_gpu=False)
    streams = (resources.train_decode, resources.eval_decode)
    assert all(stream.tasks >= 1 and stream.cpus > 0 for stream in streams)
    assert num_workers * (resources.cpus + sum(stream.tasks * stream.cpus for stream in streams)) <= cpus


def test_a_node_of_small_share_does_not_take_a_lost_ones_worker() -> None:
    for cpus in (1, 2):
        worker = share_resources({"CPU": 2 * cpus}, 2, use_gpu=False)
        assert cpus // worker.cpus == 1
        left = share_what_is_left(worker, {"CPU": cpus}, 1)
        assert left.cpus + left.train_decode.cpus + left.eval_decode.cpus <= cpus


def test_decoding_shrinks_where_more_workers_share_a_node() -> None:
    worker = share_resources({"CPU": 32}, 2, use_gpu=False)
    assert worker.train_decode.tasks == 15
    crowded = share_what_is_left(worker, {"CPU": 16}, 2)
    assert crowded.train_decode.tasks == 7
    assert share_what_is_left(worker, {"CPU": 64}, 2).train_decode.tasks == 31


@pytest.mark.parametrize(("room", "workers"), [(1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (9, 8), (0, 0)])
def test_an_elastic_run_takes_a_number_of_workers_that_divides_the_lanes(room: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "serving_holds", list)
    monkeypatch.setattr(elastic, "whole_nodes", lambda labels: {"node": {"CPU": 100.0}})
    policy = elastic.LanesPolicy(ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 1}), 8, board=None)
    assert policy._count_possible_workers({"node": {"CPU": float(room)}}) == workers


def test_what_serving_holds_is_no_room() -> None:
    left = beside({"a": {"CPU": 4, "GPU": 2}, "b": {"CPU": 4}}, [Held("a", {"GPU": 1, "CPU": 1}), Held("gone", {"CPU": 9})], {"GPU": 1})
    assert left == {"a": {"CPU": 3, "GPU": 1}, "b": {"CPU": 4}}


def test_a_replica_that_waits_is_put_where_it_costs_no_worker_if_it_can() -> None:
    nodes = {"full": {"CPU": 2.0}, "odd": {"CPU": 3.0}}
    assert beside(nodes, [Held(None, {"CPU": 1})], {"CPU": 2}) == {"full": {"CPU": 2.0}, "odd": {"CPU": 2.0}}
    assert beside(nodes, [Held(None, {"CPU": 1})] * 2, {"CPU": 2}) in (
        {"full": {"CPU": 1.0}, "odd": {"CPU": 2.0}},
        {"full": {"CPU": 2.0}, "odd": {"CPU": 1.0}},
    )
    assert beside(nodes, [Held(None, {"GPU": 1})], {"CPU": 2}) == nodes, "no node of the run's could ever take it"


@pytest.mark.parametrize(
    ("validation", "use_gpu", "gpus", "is_beside"),
    [
        ("inline", "auto", 8, False),
        ("auto", "auto", 0, False),  # on CPUs: nothing is free but what the workers lose
        ("auto", "auto", 2, False),
        ("auto", "auto", 3, True),
        ("auto", True, 2, False),
        ("auto", True, 3, True),
        ("auto", False, 8, False),
        ("beside", "auto", 0, True),
        ("beside", "auto", 3, True),
        ("beside", False, 0, True),
    ],
)
def test_validation_has_resources_of_its_own_where_there_are_some(validation: str, use_gpu: bool | str, gpus: int, is_beside: bool) -> None:
    config = TrainingConfig.model_validate({"num_workers": 2, "validation": validation, "use_gpu": use_gpu})
    assert validates_beside(config, {"CPU": 16, "GPU": gpus}) == is_beside


def test_validation_beside_wants_a_gpu_more() -> None:
    config = TrainingConfig(num_workers=2, validation="beside")
    with pytest.raises(TrainingError, match=r"beside with 2 workers needs 3 GPUs, 2 are free; set train.validation: inline"):
        validates_beside(config, {"CPU": 16, "GPU": 2})
