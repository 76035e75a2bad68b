"""`python -m eagleray`: the same as the `eagleray` command."""

from eagleray.cli import main

main()
