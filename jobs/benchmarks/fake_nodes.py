"""Ray's fake node provider, with a folder per node for what jobs bring along, as nodes on machines of their own have it.

Without that, a node that starts unpacks a running job's working directory anew, under the feet of its driver.
"""

from __future__ import annotations

import functools
import threading
from typing import Any
from unittest import mock

from ray._private import parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

from eagleray.cluster.forkserver import forked_by_the_head

_ONE_AT_A_TIME = threading.Lock()  # the autoscaler starts several from threads


class FakeNodes(FakeMultiNodeProvider):
    """Starts a raylet on this machine for each node that the autoscaler asks for."""

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        with _ONE_AT_A_TIME:
            self._create(f"runtime_resources_{self._next_node_id + 1}", arguments)

    def _create(self, folder: str, arguments: tuple[Any, ...]) -> None:
        with (
            forked_by_the_head(),
            mock.patch.object(parameter, "RayParams", functools.partial(parameter.RayParams, runtime_env_dir_name=folder)),
        ):
            super()._create_node_with_resources_and_labels(*arguments)
