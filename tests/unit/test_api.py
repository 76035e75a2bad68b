from __future__ import annotations

import pkgutil

import eagleray


def test_every_verb_of_the_command_line_is_a_function() -> None:
    verbs = [name for name in dir(eagleray) if not name.startswith("__")]
    assert {"ingest", "train", "tune", "serve", "ab_start", "submit", "doctor", "quickstart"} <= set(verbs)
    for verb in verbs:
        assert callable(getattr(eagleray, verb)) and getattr(eagleray, verb).__doc__


def test_no_module_takes_the_name_of_a_verb() -> None:
    """Once imported, it would stand in the verb's place."""
    assert not {module.name for module in pkgutil.iter_modules(eagleray.__path__)} & set(dir(eagleray))
