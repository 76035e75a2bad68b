"""Who may use the endpoint: API keys, their roles and rates.

A key's secret is 256 random bits. Only its SHA-256 is stored: with so much chance in it nobody finds a secret by trying,
so the slow hashes that protect passwords (scrypt, argon2) would add nothing but work to every request.

Keys lie in one folder, local or `s3://`, a file each, named by the hash and never changed. So two people may add and
revoke keys at the same time, and a replica that looks again reads only what is new. Whoever can write there decides who
may use the endpoint.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, PositiveFloat, ValidationError

from eagleray import storage
from eagleray.errors import ServingError
from eagleray.serving.limits import Refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

Role = Literal["predict", "admin"]
"""`predict`: predictions, feedback, metadata. `admin`: experiments besides."""

RELOAD_S = 2.0
"""A key that is added or revoked is in force after this time, and that of one look into the folder."""

KEY = "eagleray.key"
"""Of an ASGI scope: the `ApiKey` of the request, or None."""

_PREFIX = "er_"
_SUFFIX = ".json"
_OPEN_PATHS = {"/", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/v2/health/live", "/v2/health/ready"}
_OPEN_FILES = "/page/"
_ADMIN_PATHS = "/ab/"

_log = logging.getLogger("ray.serve")


class ApiKey(BaseModel):
    """A key as it is stored, without its secret."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    role: Role
    requests_per_s: PositiveFloat | None
    """None: no limit. Each ingress replica counts by itself."""
    created: datetime


# --- Keys at rest -----------------------------------------------------------------------------------------------


def add_key(keys_uri: str, name: str, role: str, requests_per_s: float | None = None) -> str:
    """Make a key and return its secret, which is not kept anywhere.

    Raises:
        ServingError: the name is taken, or name or rate cannot be.
        StorageError: the folder cannot be used.
    """
    try:
        key = ApiKey.model_validate({"name": name, "role": role, "requests_per_s": requests_per_s, "created": datetime.now(UTC)})
    except ValidationError as error:
        problem = error.errors()[0]
        raise ServingError(
            f"key '{name}': {problem['loc'][0]} {problem['input']!r}: {problem['msg'].lower()}; "
            "a name has letters, digits, '.', '_' and '-', a role is predict or admin, a rate is above zero"
        ) from None
    if any(other.name == name for other in list_keys(keys_uri)):
        raise ServingError(f"key '{name}' exists in '{keys_uri}' already; revoke it first, or choose another name")
    secret = _PREFIX + secrets.token_urlsafe(32)
    storage.write_bytes(storage.join(keys_uri, _digest(secret) + _SUFFIX), key.model_dump_json().encode())
    return secret


def list_keys(keys_uri: str) -> list[ApiKey]:
    """Return the keys by name. Raises ServingError, StorageError."""
    return sorted(load_keys(keys_uri, {}).values(), key=lambda key: key.name)


def revoke_key(keys_uri: str, name: str) -> None:
    """Delete the key called `name`. Raises ServingError (there is none), StorageError."""
    digests = [digest for digest, key in load_keys(keys_uri, {}).items() if key.name == name]
    if not digests:
        known = ", ".join(key.name for key in list_keys(keys_uri)) or "none"
        raise ServingError(f"there is no key '{name}' in '{keys_uri}'; there: {known}")
    for digest in digests:
        storage.delete_file(storage.join(keys_uri, digest + _SUFFIX))


def load_keys(keys_uri: str, known: dict[str, ApiKey]) -> dict[str, ApiKey]:
    """Return the keys by the SHA-256 of their secrets; those in `known` are not read again.

    Raises:
        ServingError: a file there is no key.
        StorageError: the folder cannot be read.
    """
    keys = {}
    for uri in storage.list_files(keys_uri):
        digest = uri.rpartition("/")[2].removesuffix(_SUFFIX)
        if not uri.endswith(_SUFFIX):
            continue
        try:
            keys[digest] = known.get(digest) or ApiKey.model_validate_json(storage.read_bytes(uri))
        except ValidationError:
            raise ServingError(f"'{uri}' is no API key; only `eagleray serve keys` writes to this folder") from None
    return keys


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


# --- Keys in force ----------------------------------------------------------------------------------------------


@dataclass
class TokenBucket:
    """Lets `rate` requests per second pass, and that many at once after a pause (one at least)."""

    rate: float
    tokens: float
    filled: float
    """Time of the last count, in seconds."""

    def take(self, now: float) -> float:
        """Let a request pass and return 0, or return the seconds until one may."""
        self.tokens = min(max(self.rate, 1.0), self.tokens + (now - self.filled) * self.rate)
        self.filled = now
        if self.tokens < 1.0:
            return (1.0 - self.tokens) / self.rate
        self.tokens -= 1.0
        return 0.0


class Keyring:
    """The keys in force in an ingress replica, read again every `RELOAD_S`."""

    def __init__(self) -> None:
        self._uri: str | None = None
        self._keys: dict[str, ApiKey] = {}
        self._buckets: dict[str, TokenBucket] = {}
        self._reloading: asyncio.Task[None] | None = None

    async def use(self, keys_uri: str | None) -> None:
        """Let in who has a key from `keys_uri` from now on; None: everybody.

        Raises:
            ServingError, StorageError: they cannot be read; what was in force stays.
        """
        if keys_uri == self._uri:
            return
        keys = {} if keys_uri is None else await asyncio.to_thread(load_keys, keys_uri, {})
        self.close()
        self._uri, self._keys = keys_uri, keys
        if keys_uri is not None:
            self._reloading = asyncio.create_task(self._reload(keys_uri))

    def close(self) -> None:
        if self._reloading is not None:
            self._reloading.cancel()

    async def _reload(self, keys_uri: str) -> None:
        while True:
            await asyncio.sleep(RELOAD_S)
            try:
                self._keys = await asyncio.to_thread(load_keys, keys_uri, self._keys)
            except Exception as error:  # whatever it is: without this task, nobody's key could be revoked any more
                _log.warning(f"the API keys stay as they were read last: {error}")

    def admit(self, path: str, authorization: str | None) -> ApiKey | None:
        """Let a request pass; return the key that it has, if one is needed.

        Args:
            authorization: the header of this name.

        Raises:
            Refusal: 401 no key or an unknown one, 403 a key without the role that `path` needs, 429 too many requests.
        """
        if self._uri is None or path in _OPEN_PATHS or path.startswith(_OPEN_FILES):
            return None
        digest = _digest(self._secret(authorization))
        key = self._keys.get(digest)
        if key is None:
            raise _unauthorized("the API key is unknown or was revoked", 'Bearer error="invalid_token"')
        if path.startswith(_ADMIN_PATHS) and key.role != "admin":
            raise Refusal(403, f"the key '{key.name}' has the role {key.role}; {_ADMIN_PATHS}… needs a key with the role admin")
        wait_s = 0.0 if key.requests_per_s is None else self._bucket(digest, key.requests_per_s).take(time.monotonic())
        if wait_s > 0:
            retry_after = {"Retry-After": str(math.ceil(wait_s))}
            raise Refusal(
                429, f"the key '{key.name}' may send {key.requests_per_s:g} requests per second; wait {wait_s:.2f} s", retry_after
            )
        return key

    @staticmethod
    def _secret(authorization: str | None) -> str:
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise _unauthorized("this endpoint needs an API key; send the header 'Authorization: Bearer <key>'", "Bearer")
        return secret.strip()

    def _bucket(self, digest: str, rate: float) -> TokenBucket:
        # Full at first; a revoked key's bucket is small enough to stay.
        return self._buckets.setdefault(digest, TokenBucket(rate, math.inf, time.monotonic()))


def _unauthorized(reason: str, challenge: str) -> Refusal:
    return Refusal(401, reason, {"WWW-Authenticate": challenge})


class AccessControl:
    """ASGI middleware that asks `keyring` before anything of a request's body is read.

    Args:
        refuse: makes the answer of a refusal.
    """

    def __init__(self, app: ASGIApp, keyring: Keyring, refuse: Callable[[Refusal], Callable[..., Awaitable[Any]]]) -> None:
        self._app, self._keyring, self._refuse = app, keyring, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            authorization = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"), None)
            try:
                scope[KEY] = self._keyring.admit(scope["path"], authorization)
            except Refusal as refusal:
                await self._refuse(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)
