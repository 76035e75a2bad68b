"""The pace of Ray Data's scheduling loop, which runs in a thread of the process that takes the batches.

The loop waits for tasks, but not for the one who takes what they made: while enough finished blocks lie ready, it goes round as
fast as Python does, and a training step on the CPU beside it takes several times as long.
"""

from __future__ import annotations

import time

from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor

REST_S = 0.02
"""For each block that lies ready: about what a fast training step takes with one."""

MIN_REST_S, MAX_REST_S = 0.002, 0.2


class Paced(ExecutionCallback):
    """Lets the loop rest after each round; for `DataContext.custom_execution_callback_classes`."""

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        _, output = executor._output_node
        time.sleep(min(max(MIN_REST_S, REST_S * len(output.output_queue)), MAX_REST_S))
