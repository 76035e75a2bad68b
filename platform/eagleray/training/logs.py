"""Whose lines are whose, in Ray's logs."""

from __future__ import annotations

import sys

from ray._private.ray_constants import LOG_PREFIX_ACTOR_NAME


def name_log(name: str) -> None:
    """Let what this worker writes from now on carry `name`: in its log files, before each line with `--debug`, and in Ray's dashboard."""
    for stream in (sys.stdout, sys.stderr):
        print(f"{LOG_PREFIX_ACTOR_NAME}{name}", file=stream, flush=True)
