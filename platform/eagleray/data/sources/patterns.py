"""A file, a folder or a pattern of names: which files it means."""

from __future__ import annotations

import fnmatch
import re

from eagleray import storage
from eagleray.errors import DataError

_BRACES = re.compile(r"\{([^{}]*)\}")


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern with `{000..146}` or `{a,b}` stands for, as a shell would."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        middle = [str(number).zfill(len(numbers[1])) for number in range(int(numbers[1]), int(numbers[2]) + 1)]
    else:
        middle = match[1].split(",")
    return [name for part in middle for name in expand_braces(pattern[: match.start()] + part + pattern[match.end() :])]


def matching_files(address: str, suffix: str) -> tuple[str, list[str]]:
    """Return a root URI and the files below it that `address` means, relative to it and sorted.

    Args:
        address: a file, a folder (all files below it that end in `suffix`), or a pattern with `{…}` and `*`.

    Raises:
        DataError: there are none, or one of those that braces name is missing.
    """
    address = storage.normalize_uri(address)
    if not re.search(r"[*{]", address):
        root, _, name = address.rpartition("/")
        if address.endswith(suffix) and storage.exists(address):
            return root, [name]
        root, wanted = address, [f"*{suffix}"]
    else:
        root = re.split(r"[*{]", address, maxsplit=1)[0].rpartition("/")[0]
        wanted = [name[len(root) :].lstrip("/") for name in expand_braces(address)]
    present = [uri[len(root) :].lstrip("/") for uri in storage.list_files(root)]
    names, found = set(present), set[str]()
    for name in wanted:
        matches = fnmatch.filter(present, name) if "*" in name else names & {name}
        if not matches:
            raise DataError(f"'{storage.join(root, name)}': no such file; give a {suffix} file, a folder of them, or a pattern in quotes")
        found.update(matches)
    return root, sorted(found)
