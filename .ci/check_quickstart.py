"""Fail if the quickstart's summary falls short of what the README promises."""

import json
import sys
from pathlib import Path

summary = json.loads(Path(sys.argv[1]).read_text())
problems = []
champion = summary["champion"]
if champion["test_top1"] < 0.97:
    problems.append(f"the champion's held-out top-1 is {champion['test_top1']:.3f}, promised is 0.97")
# It answered about half of the pictures: the same within chance, three standard deviations at 0.97.
if champion["top1"] < 0.97 - 3 * (0.97 * 0.03 / champion["requests"]) ** 0.5:
    problems.append(f"as served, its top-1 is {champion['top1']:.3f}, against {champion['test_top1']:.3f} before")
if summary["num_trials"] < 4:
    problems.append(f"{summary['num_trials']} trials, promised are at least 4")
if problems:
    sys.exit("quickstart: " + "; ".join(problems))
# The time is printed rather than checked: a busy machine is no defect.
print(f"quickstart: {summary['seconds']['total']} s, champion's held-out top-1 {champion['test_top1']:.3f}")
