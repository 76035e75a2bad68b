"""Reading and writing through one URI, on a local disk and on a real S3 store."""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import S3Store

from eagleray import storage
from eagleray.cluster.local_s3 import LocalS3
from eagleray.data.shards import load_manifest
from eagleray.errors import DataError, StorageError
from eagleray.ports import free_ports


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    store: S3Store = request.getfixturevalue("s3_store")
    return store.bucket_uri


def test_write_read_list_delete(root: str) -> None:
    uri = storage.join(root, "a", "b.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    assert storage.read_bytes(uri) == b"two"
    assert storage.list_files_with_sizes(root) == [(storage.normalize_uri(uri), 3)]
    storage.copy_tree(storage.join(root, "a"), storage.join(root, "c"))
    assert storage.read_bytes(storage.join(root, "c", "b.bin")) == b"two"
    storage.delete_tree(storage.join(root, "a"))
    assert not storage.exists(uri)
    storage.delete_tree(storage.join(root, "a"))


def test_of_many_writers_one_wins(root: str) -> None:
    uri = storage.join(root, "claim")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: storage.write_bytes_if_absent(uri, str(i).encode()), range(8)))
    assert sum(won) == 1
    assert storage.read_bytes(uri) == str(won.index(True)).encode()
    assert [name for name in storage.list_files(root) if "writing" in name] == []


def test_a_missing_object_is_named(root: str) -> None:
    with pytest.raises(StorageError, match=r"nothing.bin.*not found"):
        storage.read_bytes(storage.join(root, "nothing.bin"))


def test_a_missing_bucket_is_named(s3_store: S3Store) -> None:
    with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist"):
        storage.check_access("s3://no-such-bucket/x")


def test_a_wrong_key_is_named(s3_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="denied; check AWS_ACCESS_KEY_ID"):
        storage.check_access(s3_store.bucket_uri)


class _WithNarrowRights(LocalS3):
    """A store with a second user, who has rights on what is under `data` alone, as those of cluster/policies have."""

    def _identities(self) -> dict[str, Any]:
        credentials = [{"accessKey": "narrow", "secretKey": "narrow-secret"}]
        actions = [f"{verb}:bucket/data/*" for verb in ("Read", "Write", "List")]
        users = super()._identities()["identities"]
        return {"identities": [*users, {"name": "narrow", "credentials": credentials, "actions": actions}]}


@pytest.mark.slow
def test_rights_on_a_folder_of_a_bucket_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _WithNarrowRights(tmp_path) as store:
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        bucket = store.create_bucket("bucket")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "narrow")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "narrow-secret")
        target = storage.join(bucket, "data", "digits")
        storage.check_access(target)
        with pytest.raises(DataError, match="no data set there"):
            load_manifest(target)
        assert storage.write_bytes_if_absent(storage.join(target, "claim"), b"1")
        with pytest.raises(StorageError, match="access to the bucket 'bucket' was denied"):
            storage.check_access(storage.join(bucket, "others"))


def test_a_store_that_does_not_answer_is_told_of_while_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setattr(storage, "RETRY_FOR_S", 3.0)
    monkeypatch.setattr(storage, "TELL_AFTER_S", 0.5)
    monkeypatch.setattr(storage, "_told_at", -math.inf)  # whatever was told before

    def look(name: str) -> str:
        with pytest.raises(StorageError) as raised:
            storage.exists(f"s3://bucket/{name}")
        return str(raised.value)

    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(look, "ab"))
    assert all("check that it is up and AWS_ENDPOINT_URL" in end for end in ends)
    (line,) = (record.getMessage() for record in caplog.records if record.name == "eagleray.storage")
    assert re.match(
        r"'s3://bucket/[ab]': could not look it up yet, trying for [12] s more: .*check that it is up and AWS_ENDPOINT_URL", line
    )


def test_missing_credentials_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageError, match="no S3 credentials found; set AWS_ACCESS_KEY_ID"):
        storage.check_access("s3://bucket/x")


@pytest.mark.parametrize(("uri", "message"), [("gs://bucket/x", "'gs://' is not supported"), ("s3:///x", "no bucket")])
def test_a_uri_that_means_nothing_is_refused(uri: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        storage.open_uri(uri)


def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(StorageError, match="/proc/nowhere/x"):
        storage.write_bytes("/proc/nowhere/x", b"1")
