"""Who made a model package, and packages that only those with the password can read. All by the library `cryptography`.

A signature (Ed25519) is over the bytes of the card, which names the digest of the weights: one signature covers both.
The private key stays with those who register models; the endpoint needs the public ones.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eagleray import storage
from eagleray.errors import ConfigError, RegistryError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNING_KEY_VARIABLE = "EAGLERAY_SIGNING_KEY"
"""Path of the private key with which versions are signed when they are registered."""
PASSWORD_VARIABLE = "EAGLERAY_PACKAGE_PASSWORD"

SIGNATURE_NAME = "card.json.sig"
ENCRYPTED_SUFFIX = ".aesgcm"

_SALT_BYTES, _NONCE_BYTES = 16, 12


def make_key_pair(path: Path) -> str:
    """Write a private key to `path` (PEM, readable by its owner only) and the public one to `path`.pub; return the latter.

    Raises:
        ConfigError: there is a file already, or it cannot be written.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = _text(key.public_key())
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
        path.with_name(f"{path.name}.pub").write_text(f"{public}\n")
    except OSError as error:
        raise ConfigError(f"'{path}': the key cannot be written ({error.strerror}); give a new file in a folder that exists") from None
    return public


def signing_key() -> Ed25519PrivateKey | None:
    """Return the key that the environment names, None where it names none.

    Raises:
        ConfigError: there is no such file, or it holds no Ed25519 key.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    path = os.environ.get(SIGNING_KEY_VARIABLE)
    if path is None:
        return None
    try:
        key = serialization.load_pem_private_key(Path(path).read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{SIGNING_KEY_VARIABLE} '{path}': no private key there ({error}); make one with `eagleray models keygen`"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{SIGNING_KEY_VARIABLE} '{path}': not an Ed25519 key; make one with `eagleray models keygen`")
    return key


def sign(uri: str, card: bytes, key: Ed25519PrivateKey) -> None:
    """Put the signature of `card`, the bytes of the package's card, beside it."""
    storage.write_bytes(
        storage.join(uri, SIGNATURE_NAME), f"{_text(key.public_key())} {base64.b64encode(key.sign(card)).decode()}\n".encode()
    )


def signer(uri: str, card: bytes) -> str | None:
    """Return the public key by which the package at `uri` is signed, None where it is not signed.

    Raises:
        RegistryError: the signature is not one of this card.
    """
    from cryptography.exceptions import InvalidSignature

    signature_uri = storage.join(uri, SIGNATURE_NAME)
    if not storage.exists(signature_uri):
        return None
    try:
        public, signature = storage.read_bytes(signature_uri).decode().split()
        _public_key(public).verify(base64.b64decode(signature, validate=True), card)
    except (ValueError, InvalidSignature):
        raise RegistryError(f"'{uri}': its signature is not one of its card; one of them was changed, do not use it") from None
    return public


def check_signed(uri: str, card: bytes, trusted: Sequence[str]) -> None:
    """Raise RegistryError unless the package at `uri` is signed by one of the `trusted` public keys."""
    by = signer(uri, card)
    if by is None:
        raise RegistryError(f"'{uri}': not signed, and serve.trusted_keys asks for it; register it with {SIGNING_KEY_VARIABLE} set")
    if by not in trusted:
        raise RegistryError(f"'{uri}': signed by {by}, which is not among serve.trusted_keys; add it if you trust who holds it")


def encrypt(data: bytes, name: str) -> bytes:
    """Return a file of a package so that only the password opens it: salt, nonce, AES-256-GCM ciphertext bound to `name`.

    The key is derived by scrypt (n = 2^15, r = 8, p = 1: the parameters that RFC 7914 and OWASP give for files at rest).

    Raises:
        ConfigError: no password in the environment.
    """
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    salt, nonce = os.urandom(_SALT_BYTES), os.urandom(_NONCE_BYTES)
    return salt + nonce + AESGCM(_derived_key(salt)).encrypt(nonce, data, name.encode())


def decrypt(data: bytes, name: str) -> bytes:
    """Return what `encrypt` was given.

    Raises:
        ConfigError: no password in the environment.
        RegistryError: another password, or the file was changed.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    salt, nonce, ciphertext = data[:_SALT_BYTES], data[_SALT_BYTES:][:_NONCE_BYTES], data[_SALT_BYTES + _NONCE_BYTES :]
    try:
        return AESGCM(_derived_key(salt)).decrypt(nonce, ciphertext, name.encode())
    except (InvalidTag, ValueError):
        raise RegistryError(f"'{name}': cannot be decrypted; another password in {PASSWORD_VARIABLE}, or the file was changed") from None


def _derived_key(salt: bytes) -> bytes:
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    password = os.environ.get(PASSWORD_VARIABLE)
    if not password:
        raise ConfigError(f"{PASSWORD_VARIABLE} is not set; put the password there (it is never logged)")
    return Scrypt(salt=salt, length=32, n=2**15, r=8, p=1).derive(password.encode())


def _text(key: Ed25519PublicKey) -> str:
    from cryptography.hazmat.primitives import serialization

    return base64.b64encode(key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)).decode()


def _public_key(text: str) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    return Ed25519PublicKey.from_public_bytes(base64.b64decode(text, validate=True))
