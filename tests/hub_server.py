"""A Hugging Face Hub on this machine: as much of its protocol as its client needs to find and download files."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""Of every repository, which has no other."""


class Hub:
    """Repositories by name, each a folder; and what was asked of them."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories = repositories
        self.gated: set[str] = set()
        """Repositories that only some may read."""
        self.breaks: dict[str, int] = {}
        """How many more times the connection breaks off half-way through a file, by its name."""
        self.fetched: list[str] = []
        """REPOSITORY/FILE of every file that was sent."""
        self.address = ""

    def files(self, repository: str) -> dict[str, bytes]:
        folder = self.repositories[repository]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def serving(repositories: dict[str, Path]) -> Iterator[Hub]:
    """The Hub, in threads of this process, inside the block."""
    hub = Hub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def point_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Hub's client look there: it reads its environment only when it is imported."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD of /api/models/ORG/NAME/revision/…, /api/models/ORG/NAME/tree/… and /ORG/NAME/resolve/…/FILE."""

    def __init__(self, hub: Hub, *arguments: object) -> None:
        self.hub = hub
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        repository = "/".join(parts[2:4] if is_api else parts[:2])
        rest = parts[4:] if is_api else parts[2:]
        revision = rest[1] if len(rest) > 1 else "main"
        if repository not in self.hub.repositories:
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif is_api:
            self._list(repository, rest[0] if rest else "revision")
        elif repository in self.hub.gated:
            self._refuse(403, "GatedRepo", f"Access to model {repository} is restricted")
        else:
            self._file(repository, "/".join(rest[2:]))

    def _list(self, repository: str, what: str) -> None:
        files = self.hub.files(repository)
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]
        siblings = [{"rfilename": name} for name in files]
        about = {"_id": "0", "id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings, "tags": []}
        content = json.dumps(entries if what == "tree" else about).encode()
        self._send(200, content, {"Content-Type": "application/json"})

    def _file(self, repository: str, name: str) -> None:
        files = self.hub.files(repository)
        if name not in files:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        content = files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if self.command == "GET":
            self.hub.fetched.append(f"{repository}/{name}")
        left = self.hub.breaks.get(name, 0)
        breaks = left > 0 and self.command == "GET"
        self.hub.breaks[name] = left - breaks
        self._send(200, content, headers, half=breaks)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": COMMIT})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None, *, half: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if half else content)
