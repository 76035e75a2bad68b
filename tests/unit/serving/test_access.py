"""API keys: how they are kept, and whom they let in."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from eagleray.config.schema import ServingConfig
from eagleray.errors import ServingError
from eagleray.serving.access import Keyring, TokenBucket, add_key, list_keys, revoke_key
from eagleray.serving.limits import Refusal


def admit(uri: str | None, path: str, secret: str | None, times: int = 1) -> None:
    async def run() -> None:
        keyring = Keyring()
        await keyring.use(uri)
        for _ in range(times):
            keyring.admit(path, None if secret is None else f"Bearer {secret}")
        keyring.close()

    asyncio.run(run())


def refusal(uri: str | None, path: str, secret: str | None, times: int = 1) -> Refusal:
    with pytest.raises(Refusal) as refused:
        admit(uri, path, secret, times)
    return refused.value


def test_the_secret_is_not_kept(tmp_path: Path):
    secret = add_key(str(tmp_path), "web", "predict", 5.0)
    files = list(tmp_path.iterdir())
    assert len(files) == 1
    assert secret.removeprefix("er_") not in files[0].name + files[0].read_text()
    assert len(secret) > 40
    (key,) = list_keys(str(tmp_path))
    assert (key.name, key.role, key.requests_per_s) == ("web", "predict", 5.0)


def test_a_revoked_key_is_gone_and_its_name_is_free(tmp_path: Path):
    uri = str(tmp_path)
    first = add_key(uri, "web", "predict")
    with pytest.raises(ServingError, match="exists"):
        add_key(uri, "web", "admin")
    revoke_key(uri, "web")
    with pytest.raises(ServingError, match="no key 'web'"):
        revoke_key(uri, "web")
    second = add_key(uri, "web", "admin")
    assert refusal(uri, "/predict/pets", first).status == 401
    admit(uri, "/predict/pets", second)


@pytest.mark.parametrize(
    ("name", "role", "rate"), [("a/b", "predict", None), ("", "predict", None), ("a", "root", None), ("a", "admin", 0.0)]
)
def test_a_key_that_cannot_be_is_refused(tmp_path: Path, name: str, role: str, rate: float | None):
    with pytest.raises(ServingError, match="above zero"):
        add_key(str(tmp_path), name, role, rate)
    assert list_keys(str(tmp_path)) == []


def test_without_keys_everybody_is_let_in():
    admit(None, "/ab/pets", None)


def test_paths_need_their_roles(tmp_path: Path):
    uri = str(tmp_path)
    user, admin = add_key(uri, "user", "predict"), add_key(uri, "boss", "admin")
    for path in ("/v2/health/live", "/v2/health/ready", "/docs"):
        admit(uri, path, None)
    for path in ("/predict/pets", "/feedback", "/v2/models/pets/infer", "/v2/models/pets", "/v2", "/nothing"):
        missing = refusal(uri, path, None)
        assert (missing.status, missing.headers) == (401, {"WWW-Authenticate": "Bearer"})
        assert refusal(uri, path, "er_wrong").status == 401
        admit(uri, path, user)
        admit(uri, path, admin)
    assert refusal(uri, "/ab/pets", user).status == 403
    admit(uri, "/ab/pets", admin)


def test_an_empty_folder_lets_nobody_in(tmp_path: Path):
    assert refusal(str(tmp_path / "none"), "/predict/pets", "er_any").status == 401


def test_a_rate_lets_a_burst_pass_and_then_says_when_to_come_back(tmp_path: Path):
    secret = add_key(str(tmp_path), "web", "predict", 3.0)
    admit(str(tmp_path), "/predict/pets", secret, times=3)
    refused = refusal(str(tmp_path), "/predict/pets", secret, times=4)
    assert (refused.status, refused.headers) == (429, {"Retry-After": "1"})


def test_a_bucket_fills_with_time():
    bucket = TokenBucket(rate=0.5, tokens=1.0, filled=100.0)
    assert bucket.take(100.0) == 0.0
    assert bucket.take(100.0) == pytest.approx(2.0)
    assert bucket.take(101.0) == pytest.approx(1.0)
    assert bucket.take(102.0) == 0.0
    assert bucket.take(1_000.0) == 0.0
    assert bucket.take(1_000.0) > 0.0


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "serving.example.org"])
def test_a_host_that_others_reach_needs_keys_or_a_word(host: str):
    with pytest.raises(ValueError, match=r"serve.keys_uri .*or serve.allow_anonymous: true"):
        ServingConfig(host=host)
    assert ServingConfig(host=host, allow_anonymous=True).keys_uri is None
    assert ServingConfig(host=host, keys_uri="s3://bucket/keys").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_this_machine_alone_needs_none(host: str):
    assert ServingConfig(host=host).keys_uri is None


def test_a_certificate_needs_its_key():
    with pytest.raises(ValueError, match="give both"):
        ServingConfig(tls_cert_path="cert.pem")
