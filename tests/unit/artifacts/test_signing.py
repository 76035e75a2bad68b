from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch

from eagleray import storage
from eagleray.artifacts import signing
from eagleray.artifacts.package import ModelCard, load_card, save_package
from eagleray.config.schema import ModelConfig
from eagleray.data.transforms import Preprocessing
from eagleray.errors import ConfigError, RegistryError

CARD = ModelCard(
    name="pets",
    model=ModelConfig(name="cnn"),
    classes=["cat", "dog"],
    preprocessing=Preprocessing(image_size=8, eval_resize=8),
    metrics={},
    run_name="r",
    data_digest="",
    job={},
    code_version="",
)


@pytest.fixture
def public(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A key pair whose private key signs what is saved; returns the public one."""
    monkeypatch.setenv(signing.SIGNING_KEY_VARIABLE, str(tmp_path / "key.pem"))
    return signing.make_key_pair(tmp_path / "key.pem")


def save(uri: Path) -> str:
    save_package(str(uri), {"weight": torch.ones(2)}, CARD)
    return str(uri)


def test_a_key_is_its_owners_alone_and_never_overwritten(tmp_path: Path, public: str):
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    assert (tmp_path / "key.pem.pub").read_text().strip() == public
    with pytest.raises(ConfigError, match="cannot be written"):
        signing.make_key_pair(tmp_path / "key.pem")


def test_a_package_is_trusted_by_who_signed_it(tmp_path: Path, public: str):
    uri = save(tmp_path / "package")
    assert load_card(uri, [public]).classes == ["cat", "dog"]
    other = signing.make_key_pair(tmp_path / "other.pem")
    with pytest.raises(RegistryError, match=r"not among serve\.trusted_keys"):
        load_card(uri, [other])


@pytest.mark.parametrize("change", ["card", "signature"])
def test_a_changed_package_is_refused(tmp_path: Path, public: str, change: str):
    uri = save(tmp_path / "package")
    path = tmp_path / "package" / ("card.json" if change == "card" else signing.SIGNATURE_NAME)
    path.write_text(path.read_text().replace("dog", "cow") if change == "card" else path.read_text()[:-6] + "AAAA=\n")
    with pytest.raises(RegistryError, match="its signature is not one of its card"):
        load_card(uri, [public])


def test_without_a_key_nothing_is_signed_and_only_those_who_ask_for_it_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(signing.SIGNING_KEY_VARIABLE, raising=False)
    uri = save(tmp_path / "package")
    assert load_card(uri).name == "pets"
    with pytest.raises(RegistryError, match=r"not signed, and serve\.trusted_keys asks for it"):
        load_card(uri, ["AAAA"])


@pytest.mark.parametrize("content", [None, "no key"])
def test_a_signing_key_that_is_none_stops_the_registration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None):
    if content:
        (tmp_path / "key.pem").write_text(content)
    monkeypatch.setenv(signing.SIGNING_KEY_VARIABLE, str(tmp_path / "key.pem"))
    with pytest.raises(ConfigError, match="no private key there"):
        save(tmp_path / "package")
    assert not storage.list_files(str(tmp_path / "package"))


def test_only_the_password_opens_what_is_encrypted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(signing.PASSWORD_VARIABLE, "open sesame")
    secret = signing.encrypt(b"weights", "weights.safetensors")
    assert b"weights" not in secret and secret != signing.encrypt(b"weights", "weights.safetensors")
    assert signing.decrypt(secret, "weights.safetensors") == b"weights"
    for data, name in ((secret, "card.json"), (secret[:-1] + bytes([secret[-1] ^ 1]), "weights.safetensors"), (b"short", "card.json")):
        with pytest.raises(RegistryError, match="cannot be decrypted"):
            signing.decrypt(data, name)
    monkeypatch.setenv(signing.PASSWORD_VARIABLE, "close sesame")
    with pytest.raises(RegistryError, match="another password"):
        signing.decrypt(secret, "weights.safetensors")
    monkeypatch.delenv(signing.PASSWORD_VARIABLE)
    with pytest.raises(ConfigError, match="EAGLERAY_PACKAGE_PASSWORD is not set"):
        signing.encrypt(b"weights", "weights.safetensors")
