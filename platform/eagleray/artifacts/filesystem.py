"""A pyarrow filesystem whose files appear whole, and which tries again what passes.

Ray Train writes the list of a run's checkpoints in place and gives up at the first error of a store: a full disk or
a kill in that moment would cost the list, an outage of seconds the run. Given this filesystem, it does neither.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from eagleray import storage

T = TypeVar("T")


def open_resilient(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return a filesystem for small files at `uri`, and the path within it; what it raises is StorageError or OSError."""
    _, path = storage.open_uri(uri)
    return pafs.PyFileSystem(_Handler("" if storage.is_local(uri) else "s3://")), path


class _Handler(pafs.FileSystemHandler):
    """Passes calls on to the filesystem of `prefix`."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Handler) and self._prefix == other._prefix

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._prefix)

    def get_type_name(self) -> str:
        return "eagleray"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> Any:
        return self._run(paths[0] if paths else "", "look it up", lambda filesystem: filesystem.get_file_info(paths))

    def get_file_info_selector(self, selector: Any) -> Any:
        return self._run(selector.base_dir, "list it", lambda filesystem: filesystem.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        self._run(path, "make it", lambda filesystem: filesystem.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        self._run(path, "delete it", lambda filesystem: filesystem.delete_dir(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._run(path, "delete it", lambda filesystem: filesystem.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("a run never empties its store")

    def delete_file(self, path: str) -> None:
        self._run(path, "delete it", lambda filesystem: filesystem.delete_file(path))

    def move(self, src: str, dest: str) -> None:
        self._run(src, "move it", lambda filesystem: filesystem.move(src, dest))

    def copy_file(self, src: str, dest: str) -> None:
        self._run(src, "copy it", lambda filesystem: filesystem.copy_file(src, dest))

    def open_input_stream(self, path: str) -> Any:
        return pa.PythonFile(io.BytesIO(storage.read_bytes(self._prefix + path)), mode="r")

    open_input_file = open_input_stream

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return pa.PythonFile(_WholeFile(self._prefix + path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError("files of a run are written whole")

    def _run(self, path: str, action: str, operation: Callable[[pafs.FileSystem], T]) -> T:
        uri = self._prefix + path
        return storage.retrying(uri, action, lambda: operation(storage.open_uri(uri)[0]))


class _WholeFile(io.BytesIO):
    """Keeps what is written, and writes it whole when closed."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self._uri = uri

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            storage.write_bytes(self._uri, data)
