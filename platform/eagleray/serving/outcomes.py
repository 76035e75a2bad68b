"""The durable log of an experiment: which request went to which variant, and what came of it.

Rows are collected and written as Parquet segments under `experiments/ID/{assignments,outcomes}/`. A writer
rewrites its open segment as it grows (a reader sees the old or the new one, never a part), so that rows are
durable within one write while files stay few. Delivery is at-least-once; reading drops duplicates by request id.

A request id carries, signed, what feedback needs: experiment, variant, revision and a digest of the predicted
label. Feedback therefore counts hours later, on any replica, even where the assignment's own row was lost.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import io
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eagleray import storage
from eagleray.errors import ServingError, StorageError

if TYPE_CHECKING:
    import pyarrow as pa

    from eagleray.artifacts.registry import ModelVersion, Registry

SEGMENT_ROWS = 2_000
MAX_BACKLOG_ROWS = 200_000
"""Assignments kept in memory while the store does not answer; the oldest are dropped (and counted) beyond it."""

Row = dict[str, Any]

_KEY_NAME = "signing.key"


def assignments_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("request_id", pa.string()),
            ("time", pa.timestamp("us", tz="UTC")),
            ("variant", pa.string()),
            ("version", pa.int32()),
            ("revision", pa.int32()),
            ("key_hash", pa.string()),
            ("label", pa.string()),
            ("probability", pa.float32()),
            ("latency_ms", pa.float32()),
            ("is_error", pa.bool_()),
            ("covariate", pa.float64()),  # what was known of the user before, as the request said
            ("answered_label", pa.string()),  # of a shadow's row: the label that the user got
            ("saliency_similarity", pa.float32()),  # of a sample of a shadow's rows: with the network that answered
        ]
    )


def outcomes_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("request_id", pa.string()),
            ("time", pa.timestamp("us", tz="UTC")),
            ("variant", pa.string()),
            ("revision", pa.int32()),
            ("label", pa.string()),
            ("value", pa.float64()),  # 1 or 0 where the outcome is a success or not
        ]
    )


# --- Request ids ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RequestId:
    """What a request id says."""

    experiment: str
    variant: str
    revision: int
    label_digest: str

    def predicted(self, label: str) -> bool:
        """Whether `label` is what was answered."""
        return self.label_digest == _label_digest(label)


def load_signing_key(experiments_uri: str) -> bytes:
    """Return the key that signs request ids, made on first use; all endpoints of a workspace share it."""
    uri = storage.join(experiments_uri, _KEY_NAME)
    if not storage.exists(uri):
        storage.write_bytes_if_absent(uri, secrets.token_bytes(32))
    return storage.read_bytes(uri)


def new_request_id(key: bytes, experiment: str, variant: str, revision: int, label: str) -> str:
    body = f"{secrets.token_hex(8)}.{experiment}.{variant}.{revision}.{_label_digest(label)}"
    return f"{body}.{_signature(key, body)}"


def parse_request_id(key: bytes, request_id: str) -> RequestId:
    """Check and read a request id.

    Raises:
        ServingError: it was not issued here.
    """
    body, _, signature = request_id.rpartition(".")
    parts = body.split(".")
    if len(parts) != 5 or not hmac.compare_digest(signature.encode(), _signature(key, body).encode()):
        raise ServingError("this request_id was not issued by this endpoint; send the one in the answer of /predict, unchanged")
    return RequestId(experiment=parts[1], variant=parts[2], revision=int(parts[3]), label_digest=parts[4])


def version_of(registry: Registry, request_id: str) -> ModelVersion:
    """Return the version that answered a request, from the events of its experiment.

    Raises:
        ServingError: the id was not issued by an endpoint of the registry's workspace, or its experiment is not recorded.
    """
    issued = parse_request_id(load_signing_key(registry.workspace.experiments_uri), request_id)
    model = issued.experiment.rsplit("-", 2)[0]
    for event in registry.events(model):
        if event.get("experiment") == issued.experiment and issued.variant in event.get("versions", {}):
            return registry.resolve(f"{model}:{event['versions'][issued.variant]}")
    raise ServingError(f"request_id of experiment '{issued.experiment}': no event says which versions it compared")


def _label_digest(label: str) -> str:
    return hashlib.blake2b(label.encode(), digest_size=4).hexdigest()


def _signature(key: bytes, body: str) -> str:
    return hmac.new(key, body.encode(), hashlib.sha256).hexdigest()[:16]


def hash_routing_key(salt: str, routing_key: str) -> str:
    """Return what is logged in place of a routing key, which may name a person."""
    return hmac.new(salt.encode(), routing_key.encode(), hashlib.sha256).hexdigest()[:16]


# --- Writing ----------------------------------------------------------------------------------------------------


class SegmentWriter:
    """Appends rows to Parquet segments under a URI; one writer's files are its own. Not thread-safe."""

    def __init__(self, uri: str, schema: pa.Schema) -> None:
        self._uri = uri
        self._schema = schema
        self._writer = secrets.token_hex(6)
        self._segment = 0
        self._rows: list[Row] = []

    def write(self, rows: list[Row]) -> None:
        """Make `rows` durable. Raises StorageError; then they may or may not be there, and can be written again."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        grown = self._rows + rows
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(grown, schema=self._schema), buffer, compression="zstd")
        try:
            storage.write_bytes(storage.join(self._uri, f"{self._writer}-{self._segment:06d}.parquet"), buffer.getvalue())
        except StorageError:
            self._segment += 1  # it may be there all the same, and readers rely on it that a full segment never changes
            raise
        self._rows = grown
        if len(grown) >= SEGMENT_ROWS:
            self._rows = []
            self._segment += 1


class GroupCommit:
    """Collects rows on the event loop and writes them together on a thread, one write at a time."""

    def __init__(self, write: Callable[[list[Row]], None], linger_s: float, max_rows: int) -> None:
        self._write = write
        self._linger_s = linger_s
        self._max_rows = max_rows
        self._pending: list[tuple[Row | None, asyncio.Future[None] | None]] = []
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.dropped = 0

    def add(self, row: Row) -> None:
        """Take a row that will be written soon; it is kept while the store does not answer."""
        self._take(row, None)
        if len(self._pending) > MAX_BACKLOG_ROWS:
            del self._pending[0]
            self.dropped += 1

    async def add_durably(self, row: Row) -> None:
        """Return once the row is durable. Raises StorageError where it could not be written."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._take(row, future)
        await future

    async def flush(self) -> None:
        """Return once all rows taken so far are durable. Raises StorageError where they could not be written."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._take(None, future)
        self._hurry.set()
        await future

    def _take(self, row: Row | None, future: asyncio.Future[None] | None) -> None:
        self._pending.append((row, future))
        if len(self._pending) >= self._max_rows:
            self._hurry.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._commit())

    async def _commit(self) -> None:
        while self._pending:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), self._linger_s)
            self._hurry.clear()
            batch, self._pending = self._pending, []
            rows = [row for row, _ in batch if row is not None]
            try:
                if rows:
                    await asyncio.to_thread(self._write, rows)
            except StorageError as error:
                self._pending = [(row, None) for row, future in batch if future is None] + self._pending
                _resolve(batch, error)
                return  # the next row tries again
            _resolve(batch, None)


def _resolve(batch: list[tuple[Row | None, asyncio.Future[None] | None]], error: StorageError | None) -> None:
    for _, future in batch:
        if future is None or future.done():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


class ExperimentLog:
    """The log of one experiment, as one ingress replica writes it. Lives on the event loop."""

    def __init__(self, experiments_uri: str, experiment: str) -> None:
        uri = storage.join(experiments_uri, experiment)
        # An answer does not wait for its row; feedback does, so that what is acknowledged is durable.
        assignments = SegmentWriter(storage.join(uri, "assignments"), assignments_schema())
        self.assignments = GroupCommit(assignments.write, linger_s=1.0, max_rows=500)
        outcomes = SegmentWriter(storage.join(uri, "outcomes"), outcomes_schema())
        self.outcomes = GroupCommit(outcomes.write, linger_s=0.02, max_rows=500)

    async def flush(self) -> None:
        """Return once all rows taken so far are durable. Raises StorageError where they could not be written."""
        await asyncio.gather(self.assignments.flush(), self.outcomes.flush())


# --- Reading ----------------------------------------------------------------------------------------------------


class LogReader:
    """Reads the log of one experiment again and again; segments that are full are read once. Not thread-safe."""

    def __init__(self, experiments_uri: str, experiment: str) -> None:
        self._uri = storage.join(experiments_uri, experiment)
        self._full: dict[str, pa.Table] = {}

    def assignments(self) -> pa.Table:
        """Return all assignments, one row per request id and variant: a shadow has its own row of a request."""
        return self._read("assignments", assignments_schema(), ["request_id", "variant"])

    def outcomes(self) -> pa.Table:
        """Return all outcomes, one row per request id: the latest where one was corrected."""
        return self._read("outcomes", outcomes_schema(), ["request_id"])

    def _read(self, folder: str, schema: pa.Schema, keys: list[str]) -> pa.Table:
        import pyarrow as pa

        files = [file for file in storage.list_files(storage.join(self._uri, folder)) if file.endswith(".parquet")]
        tables = [self._segment(file, schema) for file in files]
        table = pa.concat_tables(tables) if tables else schema.empty_table()
        table = table.sort_by("time").append_column("row", pa.array(range(table.num_rows), pa.int64()))
        latest = table.group_by(keys).aggregate([("row", "max")])
        return table.take(latest["row_max"]).sort_by("row").drop_columns(["row"])

    def _segment(self, uri: str, schema: pa.Schema) -> pa.Table:
        import pyarrow.parquet as pq

        if uri not in self._full:
            table = pq.read_table(io.BytesIO(storage.read_bytes(uri)), schema=schema)
            if table.num_rows < SEGMENT_ROWS:
                return table
            self._full[uri] = table
        return self._full[uri]
