"""The state of a run at rest: one file, which is whole or does not count.

It is a zip archive, as torch writes them, that carries a checksum of each of its parts: half a file, or one with a
flipped bit, is told from a whole one by itself, wherever it was copied to.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from eagleray import storage
from eagleray.errors import StorageError, TrainingError

CHECKPOINT_NAME = "state.pt"
SHARDS_NAME = "shards"
"""Folder of what each rank has written of a network that is cut up among them."""


def dump_state(state: dict[str, Any]) -> bytes:
    """Return a run's state (tensors of any device, numbers, texts) as the bytes of a file; what changes later is not in it."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def save_state(uri: str | Path, state: dict[str, Any]) -> None:
    """Write a run's state into the folder `uri`, so that a reader sees all of it or nothing."""
    storage.write_bytes(storage.join(str(uri), CHECKPOINT_NAME), dump_state(state))


def load_state(uri: str | Path) -> dict[str, Any]:
    """Read a state written by `save_state`, on the CPU; nothing in it is executed.

    Raises:
        TrainingError: there is none, or it is damaged.
        StorageError: the store does not answer.
    """
    try:
        file = io.BytesIO(storage.read_bytes(storage.join(str(uri), CHECKPOINT_NAME)))
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise TrainingError(f"checkpoint '{uri}' is missing") from None
        raise
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        damaged = str(error)
    if damaged is not None:
        raise TrainingError(f"checkpoint '{uri}' is damaged ({damaged})")
    file.seek(0)
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def dump_shards(state: dict[str, Any], rank: int) -> dict[str, bytes]:
    """Return this rank's part of a state that is cut up among the ranks, as a file by name; to be called by all of them.

    It is a zip archive of what `torch.distributed.checkpoint` writes, whose files have no checksums of their own.

    Args:
        state: tensors, among them `DTensor`s, and numbers, in nested dicts.
    """
    from torch.distributed.checkpoint.state_dict_saver import save  # takes seconds to load, which nobody else needs

    file = io.BytesIO()
    with tempfile.TemporaryDirectory(prefix="eagleray-shards-") as directory, zipfile.ZipFile(file, "w") as archive:
        save(state, checkpoint_id=directory)
        for path in Path(directory).iterdir():
            archive.write(path, path.name)
    return {f"rank-{rank:05d}.zip": file.getvalue()}


def load_shards(uri: str, state: dict[str, Any]) -> None:
    """Fill `state`, a state of the same names for any number of ranks, from the files of `dump_shards` in the folder `uri`.

    Raises:
        TrainingError: a file is missing or damaged.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    remedy = f"delete the folder '{uri}' and resume: the run goes on from the checkpoint before it"
    with tempfile.TemporaryDirectory(prefix="eagleray-shards-") as directory:
        for file_uri in storage.list_files(storage.join(uri, SHARDS_NAME)):
            try:
                with zipfile.ZipFile(io.BytesIO(storage.read_bytes(file_uri))) as archive:
                    archive.extractall(directory)  # compares the checksums
            except zipfile.BadZipFile as error:
                raise TrainingError(f"checkpoint shard '{file_uri}' is damaged ({error}); {remedy}") from None
        try:
            load(state, checkpoint_id=directory)
        except CheckpointException as error:
            raise TrainingError(f"checkpoint '{uri}' lacks a shard ({next(iter(error.failures.values()))[0]}); {remedy}") from error
