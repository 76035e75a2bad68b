"""The errors a user can meet.

Every message says what was wrong, where, and what to do about it; the CLI prints it in one
line and exits 2. Anything else that is raised is a defect of eagleray and keeps its trace.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EagleRayError(Exception):
    """Base of all errors whose message is meant for the user."""


class ConfigError(EagleRayError):
    """A job file or a command-line setting that cannot be used."""


class StorageError(EagleRayError):
    """A URI that cannot be read or written."""


class StorageFullError(StorageError):
    """A disk on which no space is left."""


class DataError(EagleRayError):
    """Pictures, shards or manifests that cannot be used."""


class TrainingError(EagleRayError):
    """A training run that cannot start or go on."""


class Interrupted(EagleRayError):
    """A run that was asked to stop and has saved where it is; `signal_number` is what asked."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class SearchError(EagleRayError):
    """A search that cannot start or go on."""


class RegistryError(EagleRayError):
    """A model, version or alias that is not there or does not verify."""


class ServingError(EagleRayError):
    """An endpoint or experiment that cannot be started or changed."""


class ClusterError(EagleRayError):
    """A Ray cluster or job that cannot be reached or used."""


def near_miss(name: str, choices: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the choice nearest to `name`, or an empty string."""
    nearest = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""
