"""A hub on 127.0.0.1: as much of the hub's interface as its own client needs to fetch models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """Models by name: branch -> folder. `requests` has what was asked, in order."""

    models: dict[str, dict[str, Path]]
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def commit(self, name: str, revision: str) -> str:
        return hashlib.sha1(f"{name} {revision}".encode()).hexdigest()

    def revision(self, name: str, asked: str) -> str | None:
        """The branch that is asked for by its name or its commit."""
        for branch in self.models[name]:
            if asked in (branch, self.commit(name, branch)):
                return branch
        return None


@contextmanager
def hub_server(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if path.startswith("/api/models/"):
                name, _, rest = self._named(path.removeprefix("/api/models/"))
                kind, _, revision = rest.partition("/")
            else:
                name, _, rest = self._named(path.removeprefix("/"))
                kind, _, rest = rest.partition("/")
                revision, _, rest = rest.partition("/")
            if name not in hub.models:
                return self._refuse(401, "RepoNotFound", "Repository not found")
            if name in hub.gated and kind != "revision":  # what a model is called is no secret
                return self._refuse(401, "GatedRepo", "Access to this model is restricted")
            branch = hub.revision(name, revision or "main")
            if branch is None:
                return self._refuse(404, "RevisionNotFound", "Revision not found")
            folder, commit = hub.models[name][branch], hub.commit(name, branch)
            if kind == "resolve":
                return self._file(folder / rest, commit)
            if kind == "tree":
                entries = [
                    {"type": "file", "path": str(file.relative_to(folder)), "oid": _etag(file)}
                    | {"size": file.stat().st_size}
                    for file in sorted(folder.rglob("*"))
                    if file.is_file()
                ]
                return self._send(200, json.dumps(entries).encode())
            return self._send(200, json.dumps({"id": name, "sha": commit, "siblings": []}).encode())

        def _named(self, path: str) -> tuple[str, str, str]:
            """("organisation/name", "/", the rest)"""
            parts = path.split("/", 2)
            return "/".join(parts[:2]), "/", parts[2] if len(parts) == 3 else ""

        def _file(self, file: Path, commit: str) -> None:
            if not file.is_file():
                return self._refuse(404, "EntryNotFound", "Entry not found")
            headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": commit}
            return self._send(200, file.read_bytes(), **headers)

        def _refuse(self, status: int, code: str, message: str) -> None:
            self._send(status, b"", **{"X-Error-Code": code, "X-Error-Message": message})

        def _send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
