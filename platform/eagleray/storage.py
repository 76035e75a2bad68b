"""One URI in, a pyarrow filesystem out; and the two writes that pyarrow does not have.

`file:///path`, a plain path and `s3://bucket/key` are understood. S3 credentials, region and
endpoint come from the environment or the AWS configuration files (`AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`), never from a job file.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from eagleray.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa
    import pyarrow.fs as pafs

SCHEMES = ("file", "s3")


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
    options: dict[str, Any] = {"retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=5)}
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
    return session.client(
        "s3", region_name=session.region_name or "us-east-1", config=Config(retries={"max_attempts": 5, "mode": "standard"})
    )


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
        raise StorageError(f"'{uri}': could not {action}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
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

    bucket = urlsplit(normal).netloc
    try:
        _s3_client().head_bucket(Bucket=bucket)
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        reason = {
            404: f"the bucket '{bucket}' does not exist; create it or correct the name",
            403: f"access to the bucket '{bucket}' was denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL",
        }.get(int(status or 0), _reason(error))
        raise StorageError(f"'{uri}': {reason}") from error
    except BotoCoreError as error:
        raise StorageError(f"'{uri}': the S3 store does not answer ({_reason(error)}); check AWS_ENDPOINT_URL and the network") from error


def exists(uri: str) -> bool:
    import pyarrow.fs as pafs

    filesystem, path = open_uri(uri)
    with _explained(uri, "look it up"):
        return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def list_files(uri: str) -> list[str]:
    """Return the URIs of all files under `uri`, sorted; empty where there is nothing."""
    return [name for name, _ in list_files_with_sizes(uri)]


def list_files_with_sizes(uri: str) -> list[tuple[str, int]]:
    """Return (URI, size in bytes) of all files under `uri`, sorted; empty where there is nothing."""
    import pyarrow.fs as pafs

    filesystem, path = open_uri(uri)
    prefix = "" if is_local(uri) else "s3://"
    with _explained(uri, "list it"):
        infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    return sorted((prefix + info.path, info.size) for info in infos if info.is_file)


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


def read_bytes(uri: str) -> bytes:
    with open_file(uri) as file:
        return bytes(file.read())


def write_bytes(uri: str, data: bytes) -> None:
    """Write `data` to `uri` so that a reader sees the old bytes or the new, never a part."""
    filesystem, path = open_uri(uri)
    with _explained(uri, "write it"):
        if is_local(uri):
            os.replace(_temporary_sibling(path, data), path)
        else:
            with filesystem.open_output_stream(path) as stream:
                stream.write(data)


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
    from botocore.exceptions import ClientError

    parts = urlsplit(normal)
    with _explained(uri, "write it"):
        try:
            _s3_client().put_object(Bucket=parts.netloc, Key=parts.path.lstrip("/"), Body=data, IfNoneMatch="*")
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in ("PreconditionFailed", "ConditionalRequestConflict", "412"):
                return False
            raise
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
    filesystem, path = open_uri(uri)
    with _explained(uri, "delete it"):
        filesystem.delete_file(path)


def delete_tree(uri: str) -> None:
    """Delete `uri` and all below it; nothing happens where there is nothing."""
    filesystem, path = open_uri(uri)
    if exists(uri):
        with _explained(uri, "delete it"):
            filesystem.delete_dir(path)


def copy_tree(source_uri: str, target_uri: str) -> None:
    """Copy all files under `source_uri` to `target_uri`."""
    import pyarrow.fs as pafs

    source, source_path = open_uri(source_uri)
    target, target_path = open_uri(target_uri)
    with _explained(target_uri, f"copy '{source_uri}' there"):
        target.create_dir(target_path, recursive=True)
        pafs.copy_files(source_path, target_path, source_filesystem=source, destination_filesystem=target)


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
