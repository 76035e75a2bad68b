"""A real PostgreSQL on this machine, reachable through a socket of its own alone."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psycopg
from psycopg.sql import SQL, Identifier

from eagleray.errors import ClusterError

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
INSTALL = "sudo apt-get install postgresql (other systems: https://www.postgresql.org/download/)"

_FOLDERS = Path("/usr/lib/postgresql")


class LocalPostgres:
    """Runs a PostgreSQL server over `directory` for the block; data stay there afterwards.

    It listens on no port. Its socket is in a folder that only this user may enter, so that it asks for no password.

    Raises:
        ClusterError: the program is not installed, or does not come up.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory).resolve()
        self._data = self._directory / "data"
        self._sockets = Path()
        # It refuses to run as root: Debian's package brings a user for it.
        self._account = "postgres" if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database: str = "postgres") -> str:
        """Return a database's address, as SQLAlchemy (so MLflow and Optuna) and libpq understand it."""
        return f"postgresql://eagleray@/{database}?host={self._sockets}"

    def start(self) -> None:
        """Start the server and return when it answers."""
        programs = _programs()
        self._directory.mkdir(parents=True, exist_ok=True)
        if not self._data.exists():
            self._make_files(programs)
        self._give_away(self._sockets)
        log_path = self._directory / "postgres.log"
        with open(log_path, "ab") as log:
            settings = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={self._sockets}"]
            self._process = subprocess.Popen(
                [str(programs / "postgres"), "-D", str(self._data), *settings],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us, who stop it last
                user=self._account,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._run([str(programs / "pg_isready"), "-q", "-h", str(self._sockets)]).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ClusterError(f"PostgreSQL does not come up; see {log_path}")
            time.sleep(0.1)

    def create_database(self, name: str) -> str:
        """Create a database where there is none of that name, and return its address."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone() is None:
                connection.execute(SQL("CREATE DATABASE {}").format(Identifier(name)))
        return self.url(name)

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)  # without a checkpoint, and with all its processes
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Stop the server and return when it has gone."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)  # clients are cut off
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def __enter__(self) -> LocalPostgres:
        self._sockets = Path(tempfile.mkdtemp(prefix="eagleray-pg-", dir="/tmp"))  # a socket's path has 107 bytes at most
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _make_files(self, programs: Path) -> None:
        fresh = self._directory / "data.new"  # the name changes once all is there: half of it, of a start that ended, is never used
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        self._give_away(fresh)
        options = ["--username=eagleray", "--auth=trust", "--encoding=UTF8", "--no-instructions"]
        done = self._run([str(programs / "initdb"), f"--pgdata={fresh}", *options], capture_output=True, text=True)
        if done.returncode != 0:
            raise ClusterError(f"PostgreSQL cannot make its files in '{fresh}': {done.stderr.strip().splitlines()[-1]}")
        fresh.rename(self._data)

    def _run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, check=False, user=self._account, stdin=subprocess.DEVNULL, **options)

    def _give_away(self, folder: Path) -> None:
        if self._account is not None:
            account = pwd.getpwnam(self._account)
            os.chown(folder, account.pw_uid, account.pw_gid)


def _programs() -> Path:
    """Return the folder with the server's programs; Debian keeps it off the PATH."""
    found = shutil.which("initdb")
    newest = sorted(_FOLDERS.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found is None and not newest:
        raise ClusterError(f"PostgreSQL is not installed; run: {INSTALL}")
    return (Path(found).resolve() if found is not None else newest[-1]).parent
