"""One writer at a time: a claim file says who is writing to a target, and that they are alive.

The claim is a courtesy that spares the second writer its work. What is published does not depend on it:
shards of different plans have different names, and a manifest is written by conditional write.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from eagleray import storage
from eagleray.errors import DataError, StorageError

CLAIM_NAME = "_claim.json"
DEAD_AFTER_S = 60.0
"""A claim that has not been refreshed for so long is nobody's; clocks of writers may differ by less."""

_REFRESHES = 12  # within DEAD_AFTER_S


class Claim:
    """A claim that is held; `check` before anything is published."""

    def __init__(self, uri: str, holder: dict[str, Any]) -> None:
        self._uri = uri
        self._holder = holder
        self._end = threading.Event()
        self._is_lost = False

    def check(self) -> None:
        """Raise DataError if another writer has taken the claim for dead."""
        if self._is_lost:
            raise DataError(f"'{self._uri}': another ingest took over there, as this one showed no sign of life; leave it to that one")

    def keep_alive(self, every_s: float) -> None:
        while not self._end.wait(every_s):
            # A store that cannot be reached now is told by those who write the shards.
            with suppress(StorageError):
                holder = _read(self._uri)
                if holder is None or holder["token"] != self._holder["token"]:
                    self._is_lost = True
                    return
                storage.write_bytes(self._uri, _encode(self._holder))

    def stop(self) -> None:
        self._end.set()

    def release(self) -> None:
        with suppress(StorageError):
            holder = _read(self._uri)
            if holder is not None and holder["token"] == self._holder["token"]:
                storage.delete_file(self._uri)


@contextmanager
def claimed(target: str, dead_after_s: float = DEAD_AFTER_S) -> Iterator[Claim]:
    """Hold the claim on `target` for the block.

    Raises:
        DataError: another writer holds it; says who.
        StorageError: the target cannot be written.
    """
    uri = storage.join(target, CLAIM_NAME)
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time(), "token": secrets.token_hex(8)}
    check_unclaimed(target, dead_after_s)
    if _read(uri) is not None:
        storage.delete_file(uri)
    if not storage.write_bytes_if_absent(uri, _encode(holder)):
        check_unclaimed(target, dead_after_s)
        raise DataError(f"'{target}': another ingest is starting there at this moment; look at what it makes before you run this again")
    claim = Claim(uri, holder)
    thread = threading.Thread(target=claim.keep_alive, args=(dead_after_s / _REFRESHES,), daemon=True)
    thread.start()
    try:
        yield claim
    finally:
        claim.stop()
        thread.join()  # or it might write the claim once more after it is released
        claim.release()


def check_unclaimed(target: str, dead_after_s: float = DEAD_AFTER_S) -> None:
    """Raise DataError if a writer that is alive holds the claim on `target`."""
    holder = _read(storage.join(target, CLAIM_NAME))
    if holder is None or time.time() - holder["refreshed"] > dead_after_s or _is_gone(holder):
        return
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(holder["started"]))
    raise DataError(
        f"'{target}': another ingest writes there (process {holder['pid']} on {holder['host']}, since {since}); wait for it to end, "
        f"choose another target, or stop it and run this again {dead_after_s:.0f} s later"
    )


def _is_gone(holder: dict[str, Any]) -> bool:
    """Return whether the holder was a process of this machine that has ended."""
    if holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _read(uri: str) -> dict[str, Any] | None:
    if not storage.exists(uri):
        return None
    try:
        holder: dict[str, Any] = json.loads(storage.read_bytes(uri))
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None  # released at this moment
        raise
    return holder


def _encode(holder: dict[str, Any]) -> bytes:
    return json.dumps(holder | {"refreshed": time.time()}).encode()
