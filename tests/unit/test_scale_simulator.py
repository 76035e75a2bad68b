"""The model of training past one machine: what bounds a step, when that changes, and what a run costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from jobs.benchmarks.scale import gpus, parse_setting, plan_s_per_picture, settings
from jobs.benchmarks.simulator import (
    Cluster,
    CoreCosts,
    Workload,
    allreduce_s,
    checkpoint_s,
    elastic,
    exposed_s,
    head_s,
    simulate,
    step_on_cores,
    with_needs_met,
)

WORK = Workload(
    pictures=1_281_167,
    picture_bytes=115e3,
    epochs=90,
    max_batch_per_gpu=256,
    max_global_batch=32_768,
    gradient_bytes=102e6,
    checkpoint_bytes=306e6,
    row_groups=64_059,
)
CLUSTER = Cluster(
    gpus_per_node=8,
    images_per_s_per_gpu=2500,
    decode_cores_per_gpu=10,
    images_per_s_per_core=1000,
    plan_s_per_picture=1e-8,
    nvlink_bytes_per_s=240e9,
    network_bytes_per_s=40e9,
    hop_s=20e-6,
    storage_bytes_per_s=1e12,
    upload_bytes_per_s=1e9,
    dump_bytes_per_s=1e9,
    tasks_per_s=1e6,
    usd_per_node_hour=20.0,
    head_usd_per_hour=0.5,
)
COUNTS = (1, 8, 64, 512)


@pytest.mark.parametrize("gpus", COUNTS)
@pytest.mark.parametrize(
    "setting",
    [
        "decode_cores_per_gpu",
        "images_per_s_per_core",
        "storage_bytes_per_s",
        "network_bytes_per_s",
        "nvlink_bytes_per_s",
        "upload_bytes_per_s",
        "dump_bytes_per_s",
        "tasks_per_s",
        "images_per_s_per_gpu",
    ],
)
def test_more_of_a_resource_never_makes_training_slower(setting: str, gpus: int) -> None:
    rates = [
        simulate(WORK, replace(CLUSTER, **{setting: getattr(CLUSTER, setting) * 4.0**power}), gpus).images_per_s for power in range(-6, 4)
    ]

    assert rates == pytest.approx(sorted(rates), rel=1e-9)


@pytest.mark.parametrize("gpus", COUNTS)
def test_decoding_stops_being_the_bottleneck_at_the_cores_that_are_said_to_be_needed(gpus: int) -> None:
    needed = simulate(WORK, CLUSTER, gpus).decode_cores_per_gpu_needed

    fewer, more = (simulate(WORK, replace(CLUSTER, decode_cores_per_gpu=needed * factor), gpus) for factor in (0.99, 1.01))

    assert fewer.bottleneck == "decoding"
    assert more.bottleneck != "decoding"
    assert more.waits["decoding"] == 0


@pytest.mark.parametrize("gpus", COUNTS)
def test_storage_stops_being_the_bottleneck_at_the_bandwidth_that_is_said_to_be_needed(gpus: int) -> None:
    needed = simulate(WORK, CLUSTER, gpus).storage_bytes_per_s_needed

    less, more = (simulate(WORK, replace(CLUSTER, storage_bytes_per_s=needed * factor), gpus) for factor in (0.99, 1.01))

    assert less.bottleneck == "storage"
    assert more.waits["storage"] == 0


def test_many_gpus_take_what_a_small_store_gives_and_no_more() -> None:
    small = replace(CLUSTER, storage_bytes_per_s=5e9)

    few, many = simulate(WORK, small, 8), simulate(WORK, small, 512)

    assert few.bottleneck == "GPU"
    assert many.bottleneck == "storage"
    assert many.images_per_s == pytest.approx(5e9 / 115e3, rel=0.1)  # a checkpoint's copy and the last batch of an epoch come on top
    assert many.share("storage") > 0.5


def test_gpus_are_the_bound_once_all_needs_are_met() -> None:
    poor = replace(CLUSTER, decode_cores_per_gpu=1, storage_bytes_per_s=1e9)
    estimate = simulate(WORK, poor, 64)

    assert estimate.bottleneck in ("storage", "decoding")
    assert simulate(WORK, with_needs_met(poor, estimate), 64).bottleneck == "GPU"


def test_what_a_step_is_spent_on_adds_up_to_the_step() -> None:
    for count in COUNTS:
        estimate = simulate(WORK, replace(CLUSTER, storage_bytes_per_s=5e9), count)

        assert sum(estimate.waits.values()) == pytest.approx(estimate.step_s)
        assert estimate.hours * 3600 == pytest.approx(90 * WORK.pictures / estimate.images_per_s)


def test_one_gpu_averages_nothing_and_two_send_all_gradients_once_each_way() -> None:
    free_hops = replace(CLUSTER, hop_s=0.0)

    assert allreduce_s(102e6, free_hops, 1) == 0
    assert allreduce_s(102e6, free_hops, 2) == pytest.approx(102e6 / 240e9)
    assert allreduce_s(102e6, free_hops, 16) == pytest.approx(2 * 15 / 16 * 102e6 / 40e9)


def test_averaging_gradients_hides_behind_the_backward_pass_but_for_the_last_bucket() -> None:
    assert exposed_s(allreduce=0.01, compute=0.1) == pytest.approx(0.0025)
    assert exposed_s(allreduce=0.2, compute=0.03) == pytest.approx(0.18)


def test_a_slow_network_becomes_the_bottleneck_beyond_a_node() -> None:
    slow = replace(CLUSTER, network_bytes_per_s=1e9)
    cheap = replace(WORK, picture_bytes=1e3)

    assert simulate(cheap, slow, 8).bottleneck == "GPU"
    assert simulate(cheap, slow, 64).bottleneck == "network"


def test_a_checkpoint_costs_its_copy_and_what_is_not_uploaded_by_the_next_one() -> None:
    slow = replace(CLUSTER, upload_bytes_per_s=1e6)

    assert checkpoint_s(WORK, slow, epoch_s=400) == pytest.approx(0.306)
    assert checkpoint_s(WORK, slow, epoch_s=100) == pytest.approx(0.306 + 206)


def test_a_slow_head_bounds_many_gpus_alone() -> None:
    slow = replace(CLUSTER, tasks_per_s=100)

    assert simulate(WORK, slow, 8).bottleneck == "GPU"
    assert simulate(WORK, slow, 512).bottleneck == "head"
    assert head_s(WORK, slow, 512) == pytest.approx(512 * (WORK.windows(512) + 1) / 100)


def test_the_global_batch_stays_within_its_bound() -> None:
    assert [WORK.batch_per_gpu(gpus) * gpus for gpus in COUNTS] == [256, 2048, 16_384, 32_768]


def test_whole_nodes_and_the_head_are_paid_for() -> None:
    nine = simulate(WORK, CLUSTER, 9)

    assert nine.usd == pytest.approx(nine.hours * (2 * 20.0 + 0.5))


def test_an_elastic_run_costs_the_share_of_each_of_its_sizes() -> None:
    small, large = simulate(WORK, CLUSTER, 8), simulate(WORK, CLUSTER, 64)

    hours, usd = elastic([(0.25, small), (0.75, large)])

    assert hours == pytest.approx(0.25 * small.hours + 0.75 * large.hours)
    assert usd == pytest.approx(0.25 * small.hours * 20.5 + 0.75 * large.hours * 160.5)
    assert elastic([(1.0, small)]) == (small.hours, small.usd)
    with pytest.raises(AssertionError):
        elastic([(0.5, small)])


def test_on_cores_all_costs_add_up() -> None:
    costs = CoreCosts(compute_s=1.0, contention=1.2, decode_s=0.1, other_s=0.05, allreduce_s=0.2)

    assert step_on_cores(costs) == pytest.approx(1.05 * 1.2 + 0.1 + 0.2)


def test_a_setting_of_the_user_takes_the_place_of_a_public_figure() -> None:
    measured = {"images_per_s_per_core": 1000.0, "plan_s_per_picture": 1e-8, "dump_bytes_per_s": 1e9, "tasks_per_s": 500.0}
    measured |= {"gradient_bytes": 102e6, "checkpoint_bytes": 306e6}

    work, cluster = settings(measured, gpus()["A100"], dict([parse_setting("images_per_s_per_gpu=3000"), parse_setting("epochs=16")]))

    assert (cluster.images_per_s_per_gpu, work.epochs) == (3000, 16)
    assert cluster.usd_per_node_hour == gpus()["A100"].node.usd_per_hour
    with pytest.raises(ValueError, match="no setting is named 'gpu_speed'"):
        parse_setting("gpu_speed=3000")


def test_the_order_of_a_window_at_imagenets_size_costs_less_than_decoding_it() -> None:
    assert 0 < plan_s_per_picture() < 1e-5  # a picture takes about a millisecond
