"""The state of a run at rest: one file, written whole before anybody is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CHECKPOINT_NAME = "state.pt"


def save_state(directory: str | Path, state: dict[str, Any]) -> None:
    """Write a run's state (tensors, numbers, texts) into `directory`."""
    torch.save(state, Path(directory) / CHECKPOINT_NAME)


def load_state(directory: str | Path) -> dict[str, Any]:
    """Read a state written by `save_state`, on the CPU; nothing in it is executed."""
    state: dict[str, Any] = torch.load(Path(directory) / CHECKPOINT_NAME, map_location="cpu", weights_only=True)
    return state
