"""A second terminal: commands one after the other, in a process of their own that loads the libraries once."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys


def run_commands(commands: list[list[str]], environment: dict[str, str]) -> list[str]:
    """Run `eagleray` with each list of arguments, and return what each printed; all have to end well."""
    command = [sys.executable, __file__, json.dumps(commands)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    outputs: list[str] = json.loads(result.stdout)
    return outputs


def main() -> None:
    from eagleray.cli import main as eagleray

    outputs = []
    for arguments in json.loads(sys.argv[1]):
        sys.argv = ["eagleray", *arguments]
        with contextlib.redirect_stdout(io.StringIO()) as output:
            try:
                eagleray()
            except SystemExit as end:
                if end.code:
                    sys.exit(f"{arguments}: {end.code}\n{output.getvalue()}")
        outputs.append(output.getvalue())
    print(json.dumps(outputs))


if __name__ == "__main__":
    main()
