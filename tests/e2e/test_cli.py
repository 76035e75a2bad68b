"""The command line as a person meets it: wrong input gets one line and exit code 2, and nothing is left half-written."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")} | {"AWS_EC2_METADATA_DISABLED": "true"}


def eagleray(*arguments: str, cwd: Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eagleray", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, env=ENVIRONMENT, check=False)


def refused(*arguments: str, cwd: Path) -> str:
    """Run a command that must be refused; return its one line."""
    before = sorted(cwd.rglob("*"))
    result = eagleray(*arguments, cwd=cwd)
    assert result.returncode == 2, (result.stdout, result.stderr)
    line = result.stderr.strip()
    assert line.startswith("error: ") and "\n" not in line
    assert sorted(cwd.rglob("*")) == before
    return line


JOB = "name: pets\ndata: {train: shards/train, val: shards/val}\n"


def test_a_missing_folder(tmp_path: Path) -> None:
    assert "'nowhere': no such folder" in refused("quickstart", "--data", "nowhere", cwd=tmp_path)


def test_a_folder_that_holds_another_run(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert "already holds something" in refused("quickstart", "--dir", "taken", cwd=tmp_path)


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert f"port {port}" in refused("quickstart", "--port", port, cwd=tmp_path)


def test_an_unknown_key(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB + "train: {epoch: 3}\n")
    assert "unknown key 'train.epoch' (did you mean 'epochs'?)" in refused("train", "job.yaml", cwd=tmp_path)
    (tmp_path / "job.yaml").write_text(JOB)
    assert "unknown key 'tune.trials'" in refused("tune", "job.yaml", "--set", "tune.trials=3", cwd=tmp_path)


@pytest.mark.parametrize("verb", [("train", "job.yaml"), ("serve", "status"), ("ab", "status", "pets"), ("quickstart",)])
def test_a_ray_address_where_nobody_listens(verb: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    assert "nobody listens there" in refused(*verb, "--address", "127.0.0.1:1", cwd=tmp_path)


@pytest.mark.parametrize("verb", [("submit", "job.yaml"), ("jobs", "list"), ("jobs", "logs", "x"), ("jobs", "stop", "x")])
def test_a_job_server_where_nobody_listens(verb: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    assert "nobody listens there" in refused(*verb, "--address", "http://127.0.0.1:1", cwd=tmp_path)


def test_an_s3_uri_without_credentials(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    assert "no S3 credentials found; set AWS_ACCESS_KEY_ID" in refused("ingest", ".", "s3://bucket/x", cwd=tmp_path)


def test_a_model_that_is_not_registered(tmp_path: Path) -> None:
    result = eagleray("models", "show", "pets@champion", "--root", "work", cwd=tmp_path)
    assert result.returncode == 2
    assert "no model 'pets' in the registry" in result.stderr and "none yet (train one)" in result.stderr


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--challenger", "7", "--ramp", "10%@1w"), "--ramp '10%@1w': expected share@time, such as 10%@1h"),
        (("--challenger", "7", "--ramp", "110%@1h"), "--ramp '110%@1h': expected share@time"),
        (("--challenger", "7", "--guardrail", "errors=0.1"), "--guardrail 'errors=0.1': expected error_rate="),
        (("--challenger", "7", "--guardrail", "recall=0.1"), "recall:CLASS="),
        (("--challenger", "7", "--traffic", "much"), "--traffic 'much': expected a percentage such as 10%"),
    ],
)
def test_an_experiment_that_cannot_be_read(options: tuple[str, ...], line: str, tmp_path: Path) -> None:
    assert line in refused("ab", "start", "pets", *options, cwd=tmp_path)


def test_how_many_users_an_experiment_takes(tmp_path: Path) -> None:
    result = eagleray("ab", "power", "90%", "2%", cwd=tmp_path)
    assert result.returncode == 0
    rows = {
        line.split("  ")[0].strip(): line.split()[-4:] for line in result.stdout.splitlines() if "," in line and line.strip()[0] in "wl"
    }
    watched, once = (int(rows[name][2].replace(",", "")) for name in ("watched all along", "looked at once, at the end"))
    assert once < watched < 3 * once
    assert "between 0 and 1" in refused("ab", "power", "90%", "20%", cwd=tmp_path)


def test_a_check_of_the_set_up(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        result = eagleray("doctor", "--port", str(other.getsockname()[1]), "--uri", "s3://bucket/x", cwd=tmp_path)
    assert result.returncode == 1
    assert "wrong" in result.stdout and "no S3 credentials found" in result.stdout and "torch" in result.stdout


@pytest.mark.slow
def test_ingest_then_look_at_it(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (16, 16), (index, 0, 0)).save(tmp_path / "pictures" / name / f"{index}.png")
    (tmp_path / "pictures" / "cat" / "broken.png").write_bytes(b"\x89PNG")
    too_many = eagleray("ingest", "pictures", "shards", cwd=tmp_path)
    assert too_many.returncode == 2 and "1 of 21 pictures cannot be read" in too_many.stderr
    assert not (tmp_path / "shards" / "manifest.json").exists()

    result = eagleray("ingest", "pictures", "shards", "--max-refused", "0.1", "--split", "val=0.2", "--json", "out.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "refused: cat/broken.png" in result.stdout and "images/s" in result.stdout
    rows = {split: part["rows"] for split, part in json.loads((tmp_path / "out.json").read_text()).items()}
    assert set(rows) == {"train", "val"} and sum(rows.values()) == 20
    shown = eagleray("data", "show", "shards/train", "--contact-sheet", "sheet.png", cwd=tmp_path)
    assert f"pictures: {rows['train']}" in shown.stdout and (tmp_path / "sheet.png").exists()
    assert "all shards match" in eagleray("data", "verify", "shards/train", cwd=tmp_path).stdout
    shard = next((tmp_path / "shards" / "train").glob("shard-*.parquet"))
    shard.write_bytes(b"x")
    damaged = eagleray("data", "verify", "shards/train", cwd=tmp_path)
    assert damaged.returncode == 1 and shard.name in damaged.stdout


def test_keys_are_added_listed_and_revoked(tmp_path: Path) -> None:
    added = eagleray("serve", "keys", "add", "web", "--keys", "keys", "--rate", "5", cwd=tmp_path)
    assert added.returncode == 0, added.stderr
    secret = added.stdout.rpartition("Bearer ")[2].strip()
    listed = eagleray("serve", "keys", "list", "--keys", "keys", cwd=tmp_path).stdout
    assert "web" in listed and "predict" in listed and " 5 " in listed
    assert len(secret) > 40 and secret not in listed
    assert "'web' exists" in refused("serve", "keys", "add", "web", "--keys", "keys", cwd=tmp_path)
    assert eagleray("serve", "keys", "revoke", "web", "--keys", "keys", cwd=tmp_path).returncode == 0
    assert "no key 'web'" in refused("serve", "keys", "revoke", "web", "--keys", "keys", cwd=tmp_path)


def test_a_host_that_others_reach_without_keys(tmp_path: Path) -> None:
    assert "serve.keys_uri" in refused("serve", "deploy", "pets@champion", "--host", "0.0.0.0", cwd=tmp_path)
