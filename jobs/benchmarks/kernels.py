"""Decoders beside each other on one core: decode, RandomResizedCrop(224), flip.

    uv run python -m jobs.benchmarks.kernels [--quick] [--json PATH] [--dir DIR]

See docs/performance.md for what is measured, and how.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

from jobs.benchmarks import harness
from jobs.benchmarks.harness import Report, console
from jobs.benchmarks.pictures import make_pictures

OURS = ("torch", "torchvision", "pillow", "opencv-python-headless", "simplejpeg", "numba", "numpy", "pydantic")
REQUIREMENTS = (*(f"{package}=={harness.version(package)}" for package in OURS), "PyTurboJPEG")
"""Beside eagleray's own versions: what its decoding imports, and what it does not use itself."""


def measure(directory: Path, count: int, rounds: int) -> Report:
    python = harness.make_environment("kernels", REQUIREMENTS)
    pictures = directory / f"pictures-{count}"
    if not pictures.exists():
        make_pictures(pictures, count)
    task = json.dumps({"directory": str(pictures), "count": count, "rounds": rounds})
    found = harness.run(python, "jobs.benchmarks.systems.kernels", task)
    report = Report(versions={"kernels": harness.installed_versions(python, [*OURS, "PyTurboJPEG"])})
    section = f"Decode, RandomResizedCrop(224), flip: one core, {count} pictures, {rounds} rounds"
    for row in sorted(found["rows"], key=lambda row: statistics.median(row["rates"])):
        rates = row["rates"]
        report.add(
            section,
            system=row["system"],
            images_per_s_best=max(rates),
            images_per_s_median=statistics.median(rates),
            mean_difference_to_torchvision=row["difference"],
        )
    for name, reason in found["missing"].items():
        report.add(section, system=name, note=reason)
    return report


def main() -> None:
    parser = harness.parser("kernels", __doc__, quick="fewer pictures and rounds: half a minute")
    parser.add_argument("--dir", type=Path, help="keep the pictures there, and use those that are there")
    arguments = parser.parse_args()
    count, rounds = (200, 3) if arguments.quick else (1_000, 9)
    with tempfile.TemporaryDirectory(prefix="eagleray-benchmark-") as temporary:
        directory = (arguments.dir or Path(temporary)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        report = measure(directory, count, rounds)
    report.print()
    if arguments.quick:
        console.print(f"--quick: {count} pictures and {rounds} rounds; figures of the full run are steadier.")
    if arguments.json:
        report.write(arguments.json)


if __name__ == "__main__":
    main()
