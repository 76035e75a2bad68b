from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from eagleray.errors import ServingError, StorageError
from eagleray.serving import outcomes
from eagleray.serving.experiment import Experiment, Variant
from eagleray.serving.outcomes import ExperimentLog, LogReader, load_signing_key, new_request_id, parse_request_id
from eagleray.serving.report import experiment_report

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def outcome(request_id: str, value: bool, variant: str = "champion", seconds: int = 0, revision: int = 1) -> outcomes.Row:
    time = NOW + timedelta(seconds=seconds)
    return {"request_id": request_id, "time": time, "variant": variant, "revision": revision, "label": None, "value": float(value)}


def assignment(i: int, variant: str, key: str, revision: int = 1, is_error: bool = False) -> outcomes.Row:
    return {
        "request_id": f"r{i}",
        "time": NOW,
        "variant": variant,
        "version": 1,
        "revision": revision,
        "key_hash": key,
        "label": "7",
        "probability": 0.5,
        "latency_ms": float(i),
        "is_error": is_error,
    }


def test_an_acknowledged_outcome_is_on_storage(tmp_path: Path):
    async def run() -> int:
        await ExperimentLog(str(tmp_path), "e").outcomes.add_durably(outcome("r1", True))
        return LogReader(str(tmp_path), "e").outcomes().num_rows  # as another process would, without closing the log

    assert asyncio.run(run()) == 1


def test_outcomes_that_arrive_together_share_a_write_and_segments_stay_few(tmp_path: Path):
    async def run() -> None:
        log = ExperimentLog(str(tmp_path), "e")
        for _ in range(5):
            await asyncio.gather(*(log.outcomes.add_durably(outcome(f"r{i}", True)) for i in range(1_000)))

    asyncio.run(run())
    assert len(list((tmp_path / "e" / "outcomes").glob("*.parquet"))) <= 5_000 // outcomes.SEGMENT_ROWS + 1
    assert LogReader(str(tmp_path), "e").outcomes().num_rows == 1_000


def test_assignments_are_written_soon_without_anybody_waiting(tmp_path: Path):
    async def run() -> int:
        log = ExperimentLog(str(tmp_path), "e")
        log.assignments.add(assignment(1, "champion", "k"))
        async with asyncio.timeout(20):
            while not LogReader(str(tmp_path), "e").assignments().num_rows:
                await asyncio.sleep(0.01)
        return LogReader(str(tmp_path), "e").assignments().num_rows

    assert asyncio.run(run()) == 1


def test_two_writers_and_repeated_deliveries_count_once_and_the_latest_correction_holds(tmp_path: Path):
    async def run() -> None:
        first, second = ExperimentLog(str(tmp_path), "e"), ExperimentLog(str(tmp_path), "e")
        await first.outcomes.add_durably(outcome("r1", True, seconds=0))
        await second.outcomes.add_durably(outcome("r1", True, seconds=1))
        await first.outcomes.add_durably(outcome("r1", False, seconds=2))
        await second.outcomes.add_durably(outcome("r2", True))

    asyncio.run(run())
    rows = {row["request_id"]: row["value"] == 1.0 for row in LogReader(str(tmp_path), "e").outcomes().to_pylist()}
    assert rows == {"r1": False, "r2": True}


def test_while_the_store_fails_feedback_is_refused_and_assignments_are_kept(tmp_path: Path):
    (tmp_path / "e").write_text("a file where the log's folder should be")

    async def run() -> None:
        log = ExperimentLog(str(tmp_path), "e")
        with pytest.raises(StorageError):
            await log.outcomes.add_durably(outcome("r1", True))
        log.assignments.add(assignment(1, "champion", "k"))
        with pytest.raises(StorageError):
            await log.assignments.flush()
        (tmp_path / "e").unlink()
        await log.flush()

    asyncio.run(run())
    assert LogReader(str(tmp_path), "e").assignments().num_rows == 1
    assert LogReader(str(tmp_path), "e").outcomes().num_rows == 0


def test_a_request_id_says_what_was_answered_and_cannot_be_forged(tmp_path: Path):
    key = load_signing_key(str(tmp_path))
    assert load_signing_key(str(tmp_path)) == key
    request_id = new_request_id(key, "digits-1", "challenger", 3, "stop.sign")
    issued = parse_request_id(key, request_id)
    assert (issued.experiment, issued.variant, issued.revision) == ("digits-1", "challenger", 3)
    assert issued.predicted("stop.sign")
    assert not issued.predicted("yield")
    for forged in (request_id.replace("challenger", "champion"), request_id[:-1], "", "a.b", "ü" * 5):
        with pytest.raises(ServingError, match="not issued"):
            parse_request_id(key, forged)


def test_the_report_counts_users_for_shares_and_only_the_current_revision(tmp_path: Path):
    variants = (Variant(name="champion", version=1, weight=1), Variant(name="challenger", version=2, weight=1))
    experiment = Experiment(id="e", model="digits", salt="0123456789", variants=variants, started=NOW, revised=NOW, revision=2)

    async def run() -> None:
        log = ExperimentLog(str(tmp_path), "e")
        for i in range(1, 101):
            log.assignments.add(assignment(i, "champion", "the same busy user", revision=2))
        log.assignments.add(assignment(101, "challenger", "another", revision=2, is_error=True))
        log.assignments.add(assignment(102, "challenger", "before the weights changed", revision=1))
        log.assignments.add(assignment(103, "challenger", "a tester", revision=0))
        await log.outcomes.add_durably(outcome("r1", True, revision=2))
        await log.outcomes.add_durably(outcome("r102", False, "challenger", revision=1))
        await log.flush()

    asyncio.run(run())
    report = experiment_report(experiment, LogReader(str(tmp_path), "e").assignments(), LogReader(str(tmp_path), "e").outcomes())
    champion, challenger = report["variants"]["champion"], report["variants"]["challenger"]
    assert (champion["requests"], champion["keys"], champion["share"]) == (100, 1, 0.5)
    assert (champion["p50_ms"], champion["p99_ms"]) == (50.5, 99.01)
    assert (champion["outcomes"], champion["success_rate"]) == (1, 1.0)
    assert (challenger["requests"], challenger["errors"], challenger["outcomes"], challenger["p50_ms"]) == (1, 1, 0, None)
    assert not report["sample_ratio"]["is_mismatch"]
    assert report["differences"]["challenger"]["estimate"] is None
