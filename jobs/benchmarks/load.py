"""A load generator of its own process: asks a server on this machine, and tells how long answers took.

python -m jobs.benchmarks.load '{"url": …, "bodies": […], "clients": 8, "seconds": 10}'
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path

import aiohttp
import numpy as np
from jobs.benchmarks.systems.protocol import answer


@dataclass(frozen=True)
class LoadTask:
    """Ask for so long.

    Attributes:
        bodies: files with the requests' bodies, sent in turns.
        clients: each asks again as soon as it has its answer (closed loop); with `rate`, requests that may be under way.
        rate: requests per second, sent whether or not the ones before are answered (open loop); None: closed loop.
        warm_up_s: at first, not counted.
    """

    url: str
    bodies: list[str]
    headers: dict[str, str]
    clients: int
    seconds: float
    warm_up_s: float = 2.0
    rate: float | None = None


@dataclass
class Tally:
    """What came back: seconds to each answer, and how often each failure."""

    starts: float
    ends: float
    latencies: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, asked: float, failure: str | None) -> None:
        now = time.perf_counter()
        if not self.starts <= asked < self.ends:
            return
        if failure is None:
            self.latencies.append(now - asked)
        else:
            self.failures[failure] += 1


async def ask(session: aiohttp.ClientSession, url: str, body: bytes, tally: Tally, asked: float) -> None:
    """Send one request; latency counts from `asked`, when it was due."""
    try:
        async with session.post(url, data=body) as response:
            await response.read()
            tally.add(asked, None if response.status == 200 else str(response.status))
    except (aiohttp.ClientError, TimeoutError) as error:
        tally.add(asked, type(error).__name__)


async def generate(task: LoadTask) -> Tally:
    bodies = cycle([Path(path).read_bytes() for path in task.bodies])
    start = time.perf_counter() + task.warm_up_s
    tally = Tally(start, start + task.seconds)

    async def client() -> None:
        while (now := time.perf_counter()) < tally.ends:
            await ask(session, task.url, next(bodies), tally, now)

    async def at_rate(rate: float) -> None:
        begun, room = time.perf_counter(), asyncio.Semaphore(task.clients)

        async def one(due: float) -> None:
            async with room:
                await ask(session, task.url, next(bodies), tally, due)

        async with asyncio.TaskGroup() as group:
            for number in count():
                due = begun + number / rate
                if due >= tally.ends:
                    break
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(one(due))

    connector = aiohttp.TCPConnector(limit=task.clients)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=task.headers) as session:
        if task.rate is not None:
            await at_rate(task.rate)
        else:
            await asyncio.gather(*(client() for _ in range(task.clients)))
    return tally


def main() -> None:
    task = LoadTask(**json.loads(sys.argv[1]))
    tally = asyncio.run(generate(task))
    p50, p99 = np.percentile(tally.latencies, [50, 99]) * 1000 if tally.latencies else (float("nan"), float("nan"))
    answer(
        {
            "requests_per_s": len(tally.latencies) / task.seconds,
            "p50_ms": round(float(p50), 3),
            "p99_ms": round(float(p99), 3),
            "answers": len(tally.latencies),
            "failures": dict(tally.failures),
        }
    )


if __name__ == "__main__":
    main()
