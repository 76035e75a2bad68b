"""Nothing is lost when machines, stores and people fail a training run: each fault is a real one.

With `-s` the tests print how long each recovery took.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from conftest import S3Store
from loop_for_tests import run
from shards_for_tests import digits_job, write_digit_shards
from test_ingest import small_disk
from typer.testing import CliRunner

from eagleray import api, storage
from eagleray.artifacts.checkpoint import load_state
from eagleray.artifacts.runs import RunInfo, claim_run, load_run
from eagleray.cli import app
from eagleray.cluster.connect import Connection
from eagleray.config.load import dump_job, load_job
from eagleray.config.schema import JobConfig
from eagleray.errors import StorageError, TrainingError
from eagleray.training import trainer
from eagleray.training.board import Progress

pytestmark = pytest.mark.slow

STEPS = 15  # of an epoch
BY_TASKS = "data.decode=cluster"  # of which more can fail; the undisturbed runs have their workers decode


def slow_model(step_s: float, hold: Path | str = "") -> str:
    return f"model={{name: 'models_for_tests:slow', params: {{step_s: {step_s}, hold: '{hold}'}}}}"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digit_shards(tmp_path_factory.mktemp("digits"))


def newest_weights(info: RunInfo) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_state(f"{info.uri}/{info.checkpoints[0][0]}")["weights"]
    return weights


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str] | None = None, timeout_s: float = 400) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def eagleray_train(job: JobConfig, address: str, *arguments: str) -> subprocess.Popen[str]:
    job_file = Path(job.workspace.root) / "job.yaml"
    job_file.parent.mkdir(parents=True, exist_ok=True)
    job_file.write_text(dump_job(job))
    command = [sys.executable, "-m", "eagleray", "train", str(job_file), "--address", address, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def has_reached(job: JobConfig, name: str, step: int) -> Callable[[], bool]:
    def condition() -> bool:
        try:
            checkpoints = load_run(job.workspace.runs_uri, name).checkpoints
        except TrainingError:  # not claimed yet
            return False
        return bool(checkpoints) and checkpoints[0][1] >= step

    return condition


def test_a_run_that_is_interrupted_and_whose_driver_is_killed_ends_like_an_undisturbed_one(
    ray_cluster: Connection, shards: Path, tmp_path: Path
) -> None:
    """Ctrl-C, SIGTERM and kill -9 within epochs, each followed by --resume: the same weights bit for bit."""
    settings = (
        "train.num_workers=1",
        "train.deterministic=true",
        "train.checkpoint_every_steps=4",
        "train.ema_decay=0.9",
        "train.epochs=8",
        "data.test=null",
    )
    job = digits_job(shards, tmp_path / "disturbed", slow_model(0.15), BY_TASKS, *settings)
    undisturbed = digits_job(shards, tmp_path / "undisturbed", slow_model(0), *settings)
    api.train(undisturbed, name="run")

    arguments, kept = ["--name", "run"], 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        process = eagleray_train(job, ray_cluster.address, *arguments)
        wait_for(has_reached(job, "run", kept + 4), process)  # it trains: imports and Ray's start are no moment of interest
        killed = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, (out, err)
        info = load_run(job.workspace.runs_uri, "run")
        assert info.is_resumable and info.state == ("lost" if number == signal.SIGKILL else "stopped")
        if number != signal.SIGKILL:
            assert "run 'run' was stopped and has saved where it is; go on with --resume run" in err
            print(f"{number.name}: {time.monotonic() - killed:.1f} s to the end of the process")
        arguments, kept = ["--resume", "run"], info.checkpoints[0][1]

    resumed = time.monotonic()
    said: dict[str, float] = {}
    api.train(job, resume="run", on_message=lambda text: said.update({text: time.monotonic()}))
    (went_on,) = (text for text in said if text.startswith("going on after step"))
    print(f"driver killed: training again {said[went_on] - resumed:.1f} s after the resume")
    step = re.fullmatch(r"going on after step (\d+) on 1 worker\(s\)", went_on)
    assert step is not None and int(step[1]) >= info.checkpoints[0][1]  # the workers outlive the driver for a moment

    ends = [load_run(side.workspace.runs_uri, "run") for side in (undisturbed, job)]
    first, second = (newest_weights(end) for end in ends)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for key in ("train_loss", "train_samples", "order_digest", "val_top1"):
        assert [metrics[key] for metrics in ends[0].history] == [metrics[key] for metrics in ends[1].history], key
    assert ends[1].state == "finished" and len(ends[1].history) == 8


def test_an_elastic_run_outlives_a_node_takes_in_a_new_one_and_is_ready_when_that_is_taken_away(
    ray_cluster: Connection, shards: Path, tmp_path: Path
) -> None:
    every = 100  # steps: the run has one checkpoint of its own before both faults
    settings = (
        "train.num_workers={min: 1, max: 2}",
        "train.epochs=16",
        "train.checkpoint_every_epochs=16",
        f"train.checkpoint_every_steps={every}",
        "train.max_failures=1",
        "data.test=null",
    )
    job = digits_job(shards, tmp_path, slow_model(0.3, tmp_path / "hold"), BY_TASKS, *settings)
    (tmp_path / "job.yaml").write_text(dump_job(job))
    script = Path(__file__).parent / "two_nodes.py"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(script.parent.parent)
    files = [str(tmp_path / name) for name in ("job.yaml", "out.json", "hold")]
    command = [sys.executable, str(script), *files, str(every + 5)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=environment, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr)
    out = json.loads((tmp_path / "out.json").read_text())
    when = {text: at for at, text in out["events"]}
    went_on = [(at, text) for at, text in out["events"] if text.startswith("going on")]
    assert [text.rsplit(" on ")[-1][0] for _, text in went_on] == ["1", "2", "1"]
    print(f"node killed: training again after {went_on[0][0] - when['node killed']:.1f} s on one worker")
    print(f"node added: on two workers after {went_on[1][0] - when['node added']:.1f} s")
    # The notice is no failure (one is allowed), and costs no more than was trained in its last seconds.
    gone_at = next(text for text in when if text.startswith("node taken away"))
    lost = int(gone_at.split()[-1]) - int(went_on[2][1].split()[4])
    print(f"node taken away with notice: training again after {went_on[2][0] - when[gone_at]:.1f} s on one worker, {lost} steps lost")
    assert sum("are to be taken away: saving a checkpoint" in text for _, text in out["events"]) >= 2
    assert lost < every / 2
    last = {int(metrics["epoch"]): metrics for metrics in out["epochs"]}
    undisturbed = [pause.metrics["order_digest"] for pause in run(digits_job(shards, tmp_path, *settings)) if pause.is_epoch_end]
    assert [last[epoch]["order_digest"] for epoch in range(16)] == undisturbed
    assert all(metrics["train_samples"] == 480 for metrics in out["epochs"])


def test_serving_borrows_a_worker_of_an_elastic_run_and_gives_it_back(
    ray_cluster: Connection, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that finds no room gets a worker's, at a checkpoint; the run takes it back, and its samples come in the same order."""
    from ray import serve

    monkeypatch.setattr(trainer, "ELASTIC_CHECK_S", 5.0)
    settings = ("train.num_workers={min: 1, max: 2}", "train.epochs=16", "train.checkpoint_every_epochs=16", "data.test=null")
    job = digits_job(shards, tmp_path, slow_model(0.2), BY_TASKS, *settings)
    said: list[str] = []
    progress: list[Progress] = []
    epochs: list[dict[str, float]] = []

    @serve.deployment(ray_actor_options={"num_cpus": 1.2})
    class Replica:
        def __call__(self) -> str:
            return "here"

    def has_said(text: str) -> bool:
        return any(text in line for line in said)

    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(api.train, job, name="lender", on_message=said.append, on_progress=progress.append, on_epoch=epochs.append)
        try:
            wait_for(lambda: training.done() or len(progress) > 3)
            spike = time.monotonic()
            handle = serve.run(Replica.bind(), name="spike", route_prefix="/spike")  # returns when the replica is up
            assert handle.remote().result(timeout_s=30) == "here"
            print(f"a replica that found no room was up {time.monotonic() - spike:.1f} s after it was asked for")
            wait_for(lambda: training.done() or has_said("on 1 worker"))
            calm = time.monotonic()
            serve.delete("spike")
            wait_for(lambda: training.done() or has_said("on 2 worker"))
            print(f"the run was on two workers again {time.monotonic() - calm:.1f} s after the replica had gone")
        finally:
            serve.shutdown()
        training.result(timeout=300)
    assert has_said("serving needs room: saving a checkpoint, then going on with 1 worker"), said
    steps = [int(line.split()[4]) for line in said if line.startswith("going on after step")]
    assert len(steps) == 2 and steps[0] > 0, said
    last = {int(metrics["epoch"]): metrics for metrics in epochs}
    undisturbed = [pause.metrics["order_digest"] for pause in run(digits_job(shards, tmp_path, *settings)) if pause.is_epoch_end]
    assert [last[epoch]["order_digest"] for epoch in range(16)] == undisturbed


@contextmanager
def outage(store: S3Store, seconds: float) -> Iterator[None]:
    """Take the store away for so long, from the start of the block on."""

    def give_back() -> None:
        store.proxy.upstream = store.server.endpoint

    store.proxy.upstream = "http://127.0.0.1:9"
    timer = threading.Timer(seconds, give_back)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def test_the_store_may_be_away_for_twenty_seconds(ray_cluster: Connection, s3_store: S3Store, shards: Path, tmp_path: Path) -> None:
    """Pictures, checkpoints and the list of checkpoints are on S3: nobody fails, all waits."""
    storage.copy_tree(str(shards), f"{s3_store.bucket_uri}/data")
    job = digits_job(
        shards,
        tmp_path,
        slow_model(0.1),
        BY_TASKS,
        f"workspace={{root: '{s3_store.bucket_uri}/work', tracking_uri: 'sqlite:///{tmp_path}/mlflow.db'}}",
        *(f"data.{split}={s3_store.bucket_uri}/data/{split}" for split in ("train", "val")),
        "data.test=null",
        "train.checkpoint_every_steps=5",
        "train.max_failures=0",
    )
    seen: list[float] = []
    messages: list[str] = []
    outages: list[float] = []

    def on_epoch(metrics: dict[str, float]) -> None:
        seen.append(metrics["epoch"])
        assert metrics["train_samples"] == 480
        if metrics["epoch"] == 1:
            start = time.monotonic()
            with outage(s3_store, 20):
                pass
            outages.append(time.monotonic() - start)

    trained = api.train(job, name="run", on_epoch=on_epoch, on_message=messages.append)
    assert seen == [0, 1, 2, 3] and len(messages) == 1 and messages[0].startswith("checked: ") and outages[0] >= 20
    assert s3_store.proxy.unanswered > 0
    info = load_run(job.workspace.runs_uri, "run")
    assert info.state == "finished" and info.checkpoints[0][1] == 4 * STEPS
    assert trained.metrics["val_top1"] == max(metrics["val_top1"] for metrics in info.history)


def test_a_full_disk_ends_the_run_in_one_line_and_it_goes_on_once_there_is_space(
    ray_cluster: Connection, shards: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk") as resize:
        resize("50m")
        work = tmp_path / "disk" / "work"
        job = digits_job(
            shards,
            work,
            f"workspace.tracking_uri=sqlite:///{tmp_path}/mlflow.db",
            "data.test=null",
            "train.num_workers=1",
            "train.checkpoint_every_steps=5",
        )

        filler, ended = tmp_path / "disk" / "filler", threading.Event()

        def fill() -> None:
            """Take all space, and what becomes free as old checkpoints go."""
            with open(filler, "wb", buffering=0) as file:
                while not ended.wait(0.01):
                    with suppress(OSError):
                        while True:
                            file.write(bytes(4096))

        filling = threading.Thread(target=fill)
        with pytest.raises(StorageError) as caught:
            api.train(job, name="run", on_epoch=lambda metrics: filling.start() if metrics["epoch"] == 1 else None)
        ended.set()
        filling.join()
        message = str(caught.value)
        assert f"{work}/runs/run/" in message and "the disk is full; free some space" in message and "with --resume run" in message
        assert "\n" not in message
        info = load_run(job.workspace.runs_uri, "run")
        assert info.is_resumable and info.checkpoints
        for name, _, _ in info.checkpoints:
            load_state(f"{info.uri}/{name}")

        filler.unlink()
        messages: list[str] = []
        api.train(job, resume="run", on_message=messages.append)
        assert messages[1:] == [f"going on after step {info.checkpoints[0][1]} on 1 worker(s)"]
        finished = load_run(job.workspace.runs_uri, "run")
        assert finished.state == "finished" and [metrics["epoch"] for metrics in finished.history] == [0, 1, 2, 3]


def check_what_is_shown(job: JobConfig, folder: Path) -> None:
    """The command line on a finished run."""
    show = CliRunner().invoke
    listed = show(app, ["runs", "list", "--root", str(folder), "--json", str(folder / "list.json")])
    assert listed.exit_code == 0 and "run" in listed.output and "finished" in listed.output and "2/2" in listed.output
    arguments = ["runs", "show", "run", "--root", str(folder), "--plot", str(folder / "curve.png"), "--json", str(folder / "run.json")]
    shown = show(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "best epoch" in shown.output and "step 30" in shown.output and "digits:1" in shown.output
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "run.json").read_text())
    assert summary["state"] == "finished" and summary["versions"] == ["digits:1"] and len(summary["history"]) == 2
    assert [run["name"] for run in json.loads((folder / "list.json").read_text())] == ["run"]
    with pytest.raises(TrainingError, match=r"no run there .*did you mean 'run'"):
        api.show_run(job.workspace, "rn")


def test_damaged_and_lost_checkpoints_are_named_and_the_one_before_is_taken(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    job = digits_job(shards, tmp_path, "train.num_workers=1", "train.checkpoint_every_steps=5", "train.epochs=2", "data.test=null")
    first = api.train(job, name="run")
    info = load_run(job.workspace.runs_uri, "run")
    assert [step for _, step, _ in info.checkpoints] == [30, 25, 20]
    check_what_is_shown(job, tmp_path)
    stored = tmp_path / "runs" / "run" / "job.yaml"
    assert load_job(stored) == job
    stored.write_text(stored.read_text().replace("epochs: 2", "epochs: 3", 1))
    with pytest.raises(TrainingError, match="no run there"):
        api.train(job, resume="nowhere")
    (newest, _, _), (second, _, _), _ = info.checkpoints
    state = Path(info.uri) / newest / "state.pt"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    (Path(info.uri) / second / "state.pt").unlink()
    (Path(info.uri) / second).rmdir()
    seen: list[dict[str, float]] = []
    messages: list[str] = []
    resumed = api.train(job, resume="run", on_epoch=seen.append, on_message=messages.append)
    assert f"checkpoint '{second}' is missing" in messages[1]
    assert f"{newest}' is damaged" in messages[2]
    assert messages[3] == "going on after step 20 on 1 worker(s)"
    assert [metrics["epoch"] for metrics in seen] == [1, 2], "it does not go by the run's own job file"
    assert seen[0]["train_samples"] == 480 and seen[0]["order_digest"] == info.history[1]["order_digest"]
    assert load_run(job.workspace.runs_uri, "run").checkpoints[0][1] == 45
    assert resumed.version.version == first.version.version + 1


@pytest.mark.parametrize("place", ["local", "s3"])
def test_of_runs_that_start_with_one_name_at_one_moment_one_wins(place: str, s3_store: S3Store, shards: Path, tmp_path: Path) -> None:
    root = str(tmp_path) if place == "local" else s3_store.bucket_uri
    job = digits_job(shards, tmp_path, f"workspace={{root: '{root}', tracking_uri: 'sqlite:///{tmp_path}/mlflow.db'}}")
    start = threading.Barrier(8)
    lines: list[str] = []

    def begin() -> None:
        start.wait()
        try:
            claim_run(job, "run")
            lines.append("won")
        except TrainingError as error:
            lines.append(str(error))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lines.count("won") == 1
    assert sum("already holds a run; resume it with --resume run, or choose another --name" in line for line in lines) == 7
