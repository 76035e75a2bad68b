"""What a run trains on: one data set, or several mixed by weight."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from eagleray.config.schema import DataConfig
from eagleray.data.plan import EpochPlan
from eagleray.data.shards import Manifest, load_manifest
from eagleray.errors import DataError


@dataclass(frozen=True)
class Mixture:
    """Data sets of the same classes; each sample of `manifests[i]` comes `weights[i]` times an epoch, on average over epochs."""

    uris: tuple[str, ...]
    manifests: tuple[Manifest, ...]
    weights: tuple[float, ...]

    @property
    def classes(self) -> list[str]:
        return self.manifests[0].classes

    @property
    def class_counts(self) -> dict[str, int]:
        """Pictures of each class, each counted once."""
        counts = Counter(dict.fromkeys(self.classes, 0))
        for manifest in self.manifests:
            counts.update(manifest.class_counts)
        return dict(counts)

    @cached_property
    def digest(self) -> str:
        """The data's identity: the manifest's digest, or a sha256 over several ones and their weights."""
        if len(self.manifests) == 1 and self.weights == (1.0,):
            return self.manifests[0].digest
        parts = [[manifest.digest, weight] for manifest, weight in zip(self.manifests, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def plan(self, global_batch_size: int, lanes: int, window_size: int | None, seed: int | None) -> EpochPlan:
        return EpochPlan.of(self.manifests, global_batch_size, lanes, window_size, seed, self.weights)

    def __str__(self) -> str:
        return " + ".join(f"'{uri}'" for uri in self.uris)


def load_training_set(config: DataConfig) -> Mixture:
    """Read the manifests of `data.train`.

    Raises:
        DataError: there is no data set at a URI, or its classes are not those of the first.
    """
    parts = config.train_parts
    manifests = tuple(load_manifest(part.uri) for part in parts)
    for part, manifest in zip(parts, manifests, strict=True):
        if manifest.classes != manifests[0].classes:
            raise DataError(
                f"data.train '{part.uri}' has {len(manifest.classes)} classes, '{parts[0].uri}' has {len(manifests[0].classes)}, or in "
                "another order; data sets that are mixed need the same class names"
            )
    return Mixture(tuple(part.uri for part in parts), manifests, tuple(part.weight for part in parts))
