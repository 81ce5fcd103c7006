"""The one file system that DuckDB is given: some files, under names of ours, to read and never to write.

DuckDB reads Parquet much faster by itself than through Arrow, but a path of its own file system that it may read it
may also write. Here it can do nothing but read, whatever the SQL says.
"""

import os
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

PROTOCOL = "store"


class ReadOnlyFiles(AbstractFileSystem):
    """Files by name; whatever is asked of another name or for writing fails."""

    protocol = PROTOCOL
    cachable = False

    def __init__(self, files: Mapping[str, Path]) -> None:
        super().__init__()
        self._files = dict(files)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return str(path).removeprefix(f"{PROTOCOL}://")

    def open(
        self, path: str, mode: str = "rb", block_size: Any = None, cache_options: Any = None, compression: Any = None,
        **_: Any,
    ) -> Any:  # fmt: skip
        if mode not in ("r", "rb"):
            raise PermissionError(f"{path} can only be read.")
        return _File(self._found(path))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": self._strip_protocol(path), "size": self._found(path).stat().st_size, "type": "file"}

    def exists(self, path: str, **_: Any) -> bool:
        return self._strip_protocol(path) in self._files

    def isfile(self, path: str) -> bool:
        return self.exists(path)

    def isdir(self, path: str) -> bool:
        return False

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        raise PermissionError("the files of the store are not listed.")

    def glob(self, path: str, **_: Any) -> list[str]:  # type: ignore[override]
        return [self._strip_protocol(path)] if self.exists(path) else []

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp(self._found(path).stat().st_mtime, UTC)

    def _found(self, path: str) -> Path:
        name = self._strip_protocol(path)
        if name not in self._files:
            raise FileNotFoundError(path)
        return self._files[name]


class _File:
    """An open file whose place is each thread's own: DuckDB's threads seek and read in one handle at the same time."""

    def __init__(self, path: Path) -> None:
        self.closed = True
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._size = os.fstat(self._handle).st_size
        self._place = threading.local()
        self._lock = threading.Lock()
        self.closed = False

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._size}[whence]
        self._place.now = start + offset
        return self._place.now

    def tell(self) -> int:
        return getattr(self._place, "now", 0)

    def read(self, size: int = -1) -> bytes:
        begin = self.tell()
        wanted = self._size - begin if size < 0 else size
        content = self._read_at(begin, wanted)
        self._place.now = begin + len(content)
        return content

    def _read_at(self, begin: int, size: int) -> bytes:
        if sys.platform != "win32":
            return os.pread(self._handle, size, begin)
        with self._lock:  # Windows has one place per handle
            os.lseek(self._handle, begin, os.SEEK_SET)
            return os.read(self._handle, size)

    def __del__(self) -> None:
        self.close()  # DuckDB drops files without closing them

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self._handle)
