from __future__ import annotations

import eagleray


def test_every_verb_of_the_command_line_is_a_function() -> None:
    verbs = [name for name in dir(eagleray) if not name.startswith("__")]
    assert {"ingest", "train", "tune", "serve", "ab_start", "submit", "doctor", "quickstart"} <= set(verbs)
    for verb in verbs:
        assert callable(getattr(eagleray, verb)) and getattr(eagleray, verb).__doc__
