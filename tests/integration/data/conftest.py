"""A server that speaks enough of the Hugging Face hub API for its client to download a set, with faults to order."""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest

_REVISION = re.compile(r"/api/datasets/(?P<name>[^/]+/[^/]+)/revision/(?P<revision>.+)")
_TREE = re.compile(r"/api/datasets/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)")
_FILE = re.compile(r"/datasets/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Hub:
    """What the server holds, and how it fails."""

    commits: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    """(set, commit) -> path -> content."""
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    """(set, branch) -> commit."""
    gated: dict[str, str] = field(default_factory=dict)
    """Set -> the token that opens it."""
    cuts: Counter[str] = field(default_factory=Counter)
    """Path -> how many answers still break off in the middle."""
    too_many: Counter[str] = field(default_factory=Counter)
    """Path, or "revision", -> how many answers still are 429."""
    after_revision: Any = None
    """Called once, after a branch was resolved."""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, range) of every request."""
    url: str = ""

    def commit(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit of a set that its branch points to from now on. Returns its hash."""
        digest = hashlib.sha1(b"".join(path.encode() + content for path, content in sorted(files.items()))).hexdigest()
        self.commits[name, digest] = files
        self.branches[name, branch] = digest
        return digest

    def ranges(self, path: str) -> list[str]:
        """The ranges that were asked for of a file, in order; "" is the whole."""
        return [asked for method, where, asked in self.asked if method == "GET" and where.endswith(path)]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append((self.command, unquote(path), self.headers.get("Range", "")))
        for pattern, answer in ((_REVISION, self._revision), (_TREE, self._tree), (_FILE, self._file)):
            if match := pattern.fullmatch(path):
                parts = {key: unquote(value) for key, value in match.groupdict().items()}
                return answer(**parts)
        return self._error(404, "EntryNotFound")

    def _revision(self, name: str, revision: str) -> None:
        if self._is_limited("revision"):
            return
        commit = self.hub.branches.get((name, revision), revision)
        if (name, commit) not in self.hub.commits:
            known = any(other == name for other, _ in self.hub.commits)
            return self._error(404, "RevisionNotFound" if known else "RepoNotFound")
        files = [{"rfilename": path} for path in self.hub.commits[name, commit]]
        self._json({"id": name, "sha": commit, "siblings": files})
        if self.hub.after_revision:
            self.hub.after_revision()
            self.hub.after_revision = None

    def _tree(self, name: str, revision: str) -> None:
        files = self.hub.commits[name, revision]
        self._json(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]
        )

    def _file(self, name: str, revision: str, path: str) -> None:
        if name in self.hub.gated and self.headers.get("Authorization") != f"Bearer {self.hub.gated[name]}":
            return self._error(401, "GatedRepo")
        if self._is_limited(path):
            return
        content = self.hub.commits[name, revision][path]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", revision)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cuts[path] > 0:
            self.hub.cuts[path] -= 1
            self.wfile.write(content[start : start + (len(content) - start) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def _is_limited(self, what: str) -> bool:
        if self.hub.too_many[what] <= 0:
            return False
        self.hub.too_many[what] -= 1
        self._error(429, "", {"Retry-After": "1"})
        return True

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"X-Error-Code": code, "Content-Length": "0", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty hub that answers at `hub.url`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
