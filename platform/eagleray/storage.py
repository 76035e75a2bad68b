"""One URI in, a pyarrow filesystem out; retries of what passes, and the two writes that pyarrow does not have.

`file:///path`, a plain path and `s3://bucket/key` are understood. S3 credentials, region and
endpoint come from the environment or the AWS configuration files (`AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`), never from a job file.

Retries are in two layers. The S3 clients repeat a single request that meets a 5xx, throttling, a broken
connection or silence, twice at most. `retrying` repeats the whole operation, with a new client and credentials
read anew, for what outlasts that. An operation without any progress ends in an error after
`RETRY_FOR_S` and one last try: within 100 s.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import os
import random
import secrets
import tempfile
import time
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

from eagleray.errors import StorageError, StorageFullError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pyarrow as pa
    import pyarrow.fs as pafs

SCHEMES = ("file", "s3")

CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 10.0
"""A request that gets no byte for so long is given up."""

REQUEST_TRIES = 2
"""Tries of a single request, by the S3 client."""

RETRY_FOR_S = 60.0
"""No new try of an operation begins after this time."""

RENEW_FOR_S = 10.0
"""The same, where the store says that the credentials have expired: new ones may be about to be written."""

FIRST_DELAY_S = 0.2
MAX_DELAY_S = 5.0
"""The longest pause before the next try doubles from the first to this; it is drawn from zero up (full jitter)."""

TELL_AFTER_S = 3.0
"""Time without success after which the log says what is tried again."""

TELL_EVERY_S = 30.0
"""Least time between two such lines of a process, whose threads mostly wait for the same store."""

LIST_TRIES = 10

T = TypeVar("T")

_log = logging.getLogger("eagleray.storage")


def normalize_uri(uri: str | Path) -> str:
    """Return `uri` in its one spelling: an absolute local path without scheme, or `s3://bucket/key`.

    Raises:
        StorageError: the scheme is not supported or an s3 URI names no bucket.
    """
    text = str(uri)
    parts = urlsplit(text)
    if "://" not in text:
        return os.path.abspath(os.path.expanduser(text))
    if parts.scheme not in SCHEMES:
        raise StorageError(f"'{text}': the scheme '{parts.scheme}://' is not supported; use a local path, file:// or s3://bucket/key")
    if parts.scheme == "file":
        return os.path.abspath(unquote(parts.path))
    if not parts.netloc:
        raise StorageError(f"'{text}': no bucket; an s3 URI is s3://bucket/key")
    return f"s3://{parts.netloc}{parts.path}".rstrip("/")


def is_local(uri: str) -> bool:
    return not normalize_uri(uri).startswith("s3://")


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of `uri` and the path within it.

    Raises:
        StorageError: unsupported scheme, or an s3 URI without credentials.
    """
    normal = normalize_uri(uri)
    if normal.startswith("s3://"):
        return _s3_filesystem(normal), normal.removeprefix("s3://")
    return _local_filesystem(), normal


@lru_cache(maxsize=1)
def _local_filesystem() -> pafs.FileSystem:
    import pyarrow.fs as pafs

    return pafs.LocalFileSystem()


def _s3_filesystem(uri: str) -> pafs.FileSystem:
    import pyarrow.fs as pafs

    session = _boto_session()
    credentials = session.get_credentials()
    if credentials is None:
        raise StorageError(
            f"'{uri}': no S3 credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "(and AWS_ENDPOINT_URL for a store that is not AWS), or run `aws configure`"
        )
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=REQUEST_TRIES),
        "connect_timeout": CONNECT_TIMEOUT_S,
        "request_timeout": SILENCE_TIMEOUT_S,  # on Linux the time without a byte, whatever its documentation says
    }
    if endpoint:
        address = urlsplit(endpoint)
        options |= {"endpoint_override": address.netloc, "scheme": address.scheme}
    if endpoint or session.region_name:
        options["region"] = session.region_name or "us-east-1"
    if credentials.method in ("env", "shared-credentials-file", "config-file"):
        # Roles and instance profiles expire and are renewed by pyarrow itself.
        options |= {
            "access_key": credentials.access_key,
            "secret_key": credentials.secret_key,
            "session_token": credentials.token,
        }
    return pafs.S3FileSystem(**options)


def _boto_session() -> Any:
    import boto3

    return boto3.Session()


def _s3_client() -> Any:
    from botocore.config import Config

    session = _boto_session()
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S, read_timeout=SILENCE_TIMEOUT_S, retries={"total_max_attempts": REQUEST_TRIES, "mode": "standard"}
    )
    return session.client("s3", region_name=session.region_name or "us-east-1", config=config)


def retrying(uri: str, action: str, operation: Callable[[], T], before_retry: Callable[[], object] = lambda: None) -> T:
    """Return what `operation` returns, tried again with pauses while it meets errors of the store that pass.

    Args:
        operation: repeatable as a whole; it gets its client from `open_uri`, so that a retry has new credentials.
        before_retry: called before every further try.

    Raises:
        StorageError: the store did not recover within `RETRY_FOR_S`, or the credentials have expired.
        Exception: what `operation` raises otherwise.
    """
    start, delay = time.monotonic(), FIRST_DELAY_S
    while True:
        try:
            return operation()
        except Exception as error:
            patience = RENEW_FOR_S if _is_expired(error) else RETRY_FOR_S if _passes(error) else None
            if patience is None:
                raise
            waited = time.monotonic() - start
            if waited > patience:
                raise StorageError(f"'{uri}': could not {action}: {reason(error)}") from error
            if waited > TELL_AFTER_S:
                _tell(f"'{uri}': could not {action} yet, trying for {patience - waited:.0f} s more: {reason(error)}")
        time.sleep(random.uniform(0, delay))
        delay = min(2 * delay, MAX_DELAY_S)
        before_retry()


_told_at = -math.inf


def _tell(text: str) -> None:
    global _told_at  # noqa: PLW0603 - of this process
    if time.monotonic() - _told_at > TELL_EVERY_S:
        _told_at = time.monotonic()
        _log.warning(text)


_PASSING = (
    *(
        "SLOW_DOWN",
        "SlowDown",
        "THROTTLING",
        "Throttling",
        "SERVICE_UNAVAILABLE",
        "ServiceUnavailable",
        "INTERNAL_FAILURE",
        "InternalError",
    ),
    *("REQUEST_TIMEOUT", "RequestTimeout", "NETWORK_CONNECTION", "ConditionalRequestConflict", "HTTP status 429", "HTTP status 5"),
)
"""What pyarrow, in capitals, and S3 itself call them; pyarrow gives nothing but its text."""


def _passes(error: Exception) -> bool:
    from botocore.exceptions import ClientError, HTTPClientError

    if isinstance(error, ClientError) and error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500:
        return True
    return isinstance(error, (HTTPClientError, ShortRead)) or any(mark in str(error) for mark in _PASSING)


def _is_expired(error: Exception) -> bool:
    # Without a body, as after HEAD, or with one that pyarrow does not understand, only the status is left.
    return any(mark in str(error) for mark in ("ExpiredToken", "UNKNOWN (HTTP status 400)", "UNKNOWN (HTTP status 403)"))


class ShortRead(OSError):
    """Fewer bytes came than the store had announced."""


@contextmanager
def _explained(uri: str, action: str) -> Iterator[None]:
    """Turn what pyarrow and botocore raise into one line that says what, where and what to do."""
    import pyarrow as pa
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(f"'{uri}': not found while trying to {action}; check the path") from error
    except PermissionError as error:
        raise StorageError(f"'{uri}': permission denied while trying to {action}; check your rights there") from error
    except (OSError, pa.ArrowException, BotoCoreError, ClientError) as error:
        kind = StorageFullError if getattr(error, "errno", None) == errno.ENOSPC else StorageError
        raise kind(f"'{uri}': could not {action}: {reason(error)}") from error


def _run(uri: str, action: str, operation: Callable[[pafs.FileSystem, str], T]) -> T:
    """Call `operation` with the filesystem of `uri` and the path within it; retried, and its errors explained."""
    with _explained(uri, action):
        return retrying(uri, action, lambda: operation(*open_uri(uri)))


def reason(error: Exception) -> str:
    """Return in one line what `error` of a store means and what to do, or its own words."""
    text = " ".join(str(error).split())
    if _is_expired(error):
        return (
            "the store refuses the credentials as expired; renew them (in ~/.aws/credentials they are picked up while a job runs, "
            "in AWS_* variables by the next one), then start again or resume"
        )
    for mark, advice in (
        ("NoSuchBucket", "the bucket does not exist; create it or correct the name"),
        ("NO_SUCH_BUCKET", "the bucket does not exist; create it or correct the name"),
        ("InvalidAccessKeyId", "the access key is unknown to the store; check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL"),
        ("SignatureDoesNotMatch", "the secret key is wrong; check AWS_SECRET_ACCESS_KEY"),
        ("ACCESS_DENIED", "access denied; check the key's rights on this bucket"),
        ("AccessDenied", "access denied; check the key's rights on this bucket"),
        ("No space left", "the disk is full; free some space or choose another place"),
    ):
        if mark in text:
            return advice
    if _passes(error):
        return (
            f"the store does not answer as it should ({text[:200]}); check that it is up and AWS_ENDPOINT_URL, then start again or resume"
        )
    return text[:300]


def check_access(uri: str) -> None:
    """Fail early and clearly where `uri` could never be used: no credentials, missing bucket, wrong key.

    Raises:
        StorageError: says which of these it is.
    """
    normal = normalize_uri(uri)
    if not normal.startswith("s3://"):
        return
    open_uri(normal)
    from botocore.exceptions import BotoCoreError, ClientError

    place = urlsplit(normal)
    bucket = place.netloc
    try:
        # Not `head_bucket`: rights that are limited to a prefix, as those of cluster/policies, do not include it.
        _s3_client().list_objects_v2(Bucket=bucket, Prefix=place.path.lstrip("/"), MaxKeys=1)
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        meaning = {
            404: f"the bucket '{bucket}' does not exist; create it or correct the name",
            403: f"access to the bucket '{bucket}' was denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL and the key's rights there",
        }.get(int(status or 0), reason(error))
        raise StorageError(f"'{uri}': {meaning}") from error
    except BotoCoreError as error:
        raise StorageError(f"'{uri}': the S3 store does not answer ({reason(error)}); check AWS_ENDPOINT_URL and the network") from error


def exists(uri: str) -> bool:
    import pyarrow.fs as pafs

    return _run(uri, "look it up", lambda filesystem, path: bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound))


def list_files(uri: str) -> list[str]:
    """Return the URIs of all files under `uri`, sorted; empty where there is nothing."""
    return [name for name, _ in list_files_with_sizes(uri)]


def list_files_with_sizes(uri: str) -> list[tuple[str, int]]:
    """Return (URI, size in bytes) of all files under `uri`, sorted; empty where there is nothing."""
    import pyarrow.fs as pafs

    def look(filesystem: pafs.FileSystem, path: str) -> Any:
        for _ in range(LIST_TRIES - 1):
            with suppress(FileNotFoundError):  # a file that was given its final name, or deleted, in this moment
                return filesystem.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
        return filesystem.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))

    prefix = "" if is_local(uri) else "s3://"
    infos = _run(uri, "list it", look)
    return sorted((prefix + info.path, info.size) for info in infos if info.is_file)


def read_bytes(uri: str) -> bytes:
    def read(filesystem: pafs.FileSystem, path: str) -> bytes:
        with filesystem.open_input_file(path) as file:
            data = bytes(file.read())
            if len(data) != file.size():
                raise ShortRead(f"{len(data)} of {file.size()} bytes came")
            return data

    return _run(uri, "read it", read)


@contextmanager
def open_file(uri: str, filesystem: pafs.FileSystem | None = None) -> Iterator[pa.NativeFile]:
    """Open `uri` for reading; several threads may read ranges of it at once with `read_at(size, offset)`.

    Args:
        filesystem: one that `open_uri` returned for a URI of the same scheme: making one costs more than reading a small file.
    """
    if filesystem is None:
        filesystem, path = open_uri(uri)
    else:
        path = normalize_uri(uri).removeprefix("s3://")
    with _explained(uri, "read it"), filesystem.open_input_file(path) as file:
        yield file


def write_bytes(uri: str, data: bytes) -> None:
    """Write `data` to `uri` so that a reader sees the old bytes or the new, never a part."""

    def write(filesystem: pafs.FileSystem, path: str) -> None:
        if is_local(uri):
            os.replace(_temporary_sibling(path, data), path)
        else:
            with filesystem.open_output_stream(path) as stream:
                stream.write(data)

    _run(uri, "write it", write)


def write_bytes_if_absent(uri: str, data: bytes) -> bool:
    """Write `data` to `uri` unless something is there; return whether this call wrote it.

    Of several writers at once just one gets True: a hard link locally, `If-None-Match: *` on S3.
    """
    normal = normalize_uri(uri)
    if is_local(normal):
        with _explained(uri, "write it"):
            temporary = _temporary_sibling(normal, data)
            try:
                os.link(temporary, normal)
            except FileExistsError:
                return False
            finally:
                os.unlink(temporary)
            return True
    writer = secrets.token_hex(16)
    with _explained(uri, "write it"):
        return retrying(uri, "write it", lambda: _put_if_absent(normal, data, writer))


def _put_if_absent(uri: str, data: bytes, writer: str) -> bool:
    from botocore.exceptions import ClientError

    parts = urlsplit(uri)
    place = {"Bucket": parts.netloc, "Key": parts.path.lstrip("/")}
    client = _s3_client()
    try:
        client.put_object(**place, Body=data, IfNoneMatch="*", Metadata={"writer": writer})
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") not in ("PreconditionFailed", "412"):
            raise
        # A first try may have been ours, its answer lost on the way.
        return bool(client.head_object(**place)["Metadata"].get("writer") == writer)
    return True


def _temporary_sibling(path: str, data: bytes) -> str:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        os.unlink(temporary)
        raise
    return temporary


def delete_file(uri: str) -> None:
    _run(uri, "delete it", lambda filesystem, path: filesystem.delete_file(path))


def delete_tree(uri: str) -> None:
    """Delete `uri` and all below it; nothing happens where there is nothing."""
    if exists(uri):
        _run(uri, "delete it", lambda filesystem, path: filesystem.delete_dir(path))


def copy_tree(source_uri: str, target_uri: str) -> None:
    """Copy all files under `source_uri` to `target_uri`."""
    import pyarrow.fs as pafs

    def copy(target: pafs.FileSystem, target_path: str) -> None:
        source, source_path = open_uri(source_uri)
        target.create_dir(target_path, recursive=True)
        pafs.copy_files(source_path, target_path, source_filesystem=source, destination_filesystem=target)

    _run(target_uri, f"copy '{source_uri}' there", copy)


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(filesystem: pafs.FileSystem, path: str) -> str:
    """Return the checksum of a file that need not fit into memory."""
    with filesystem.open_input_stream(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
