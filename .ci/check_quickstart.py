"""Fail if the quickstart's summary falls short of what the README promises."""

import json
import sys
from pathlib import Path

summary = json.loads(Path(sys.argv[1]).read_text())
problems = []
if summary["champion"]["top1"] < 0.97:
    problems.append(f"the champion's held-out top-1 is {summary['champion']['top1']:.3f}, promised is 0.97")
if summary["num_trials"] < 4:
    problems.append(f"{summary['num_trials']} trials, promised are at least 4")
if problems:
    sys.exit("quickstart: " + "; ".join(problems))
# The time is printed rather than checked: a busy machine is no defect.
print(f"quickstart: {summary['seconds']['total']} s, champion's held-out top-1 {summary['champion']['top1']:.3f}")
