"""Fail if the quickstart's summary falls short of what the README promises."""

import json
import sys
from pathlib import Path

summary = json.loads(Path(sys.argv[1]).read_text())
problems = []
if summary["champion"]["top1"] < 0.97:
    problems.append(f"the champion's held-out top-1 is {summary['champion']['top1']:.3f}, promised is 0.97")
if summary["seconds"]["total"] > 240:
    problems.append(f"the quickstart took {summary['seconds']['total']} s, promised are 240 s on 2 cores")
if summary["num_trials"] < 4:
    problems.append(f"{summary['num_trials']} trials, promised are at least 4")
if problems:
    sys.exit("quickstart: " + "; ".join(problems))
print(f"quickstart: {summary['seconds']['total']} s, champion's held-out top-1 {summary['champion']['top1']:.3f}")
