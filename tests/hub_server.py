"""A model hub on this machine: the few routes by which huggingface_hub makes a repository, fills it and reads it."""

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token_of_this_hub"


class Hub(ThreadingHTTPServer):
    """Repositories by name; what was asked for is counted."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.visibility: dict[str, str] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        """Files by commit hash."""
        self.newest: dict[str, str] = {}
        """Commit hash of each repository's main."""
        self.objects: dict[str, bytes] = {}
        """Large files by SHA-256."""
        self.downloads: Counter[str] = Counter()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        """Adds files to main; returns the commit's hash."""
        whole = self.commits.get(self.newest.get(repository, ""), {}) | files
        digest = hashlib.sha1(repr(sorted(whole.items())).encode()).hexdigest()
        self.commits[digest] = whole
        self.newest[repository] = digest
        return digest


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        match parts:
            case _ if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._answer({"error": "Invalid credentials"}, 401)
            case ["api", "validate-yaml"]:
                self._answer({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                told = json.loads(body)
                name = f"{told['organization']}/{told['name']}"
                self.server.visibility.setdefault(name, told["visibility"])
                self._answer({"url": f"{self.server.url}/{name}", "name": name})
            case ["api", "models", _, _, "preupload", "main"]:
                files = [one["path"] for one in json.loads(body)["files"]]
                large = [{"path": p, "uploadMode": _mode(p), "shouldIgnore": False} for p in files]
                self._answer({"files": large})
            case [owner, git, "info", "lfs", "objects", "batch"]:
                upload = {"href": f"{self.server.url}/{owner}/{git}/objects"}
                objects = [
                    {**one, "actions": {"upload": {"href": f"{upload['href']}/{one['oid']}"}}}
                    for one in json.loads(body)["objects"]
                ]
                self._answer({"transfer": "basic", "objects": objects})
            case ["api", "models", owner, name, "commit", "main"]:
                files = {}
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = self.server.objects[value["oid"]]
                made = self.server.commit(f"{owner}/{name}", files)
                url = f"{self.server.url}/{owner}/{name}/commit/{made}"
                self._answer({"success": True, "commitUrl": url, "commitOid": made})
            case _:
                self._answer({"error": self.path}, 404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[hashlib.sha256(body).hexdigest()] = body
        self._answer({})

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        match parts:
            case ["api", "models", owner, name, "revision", revision]:
                found = self._commit_of(f"{owner}/{name}", revision)
                self._answer({"id": f"{owner}/{name}", "sha": found, "siblings": []}, 200 if found else 404)
            case ["api", "models", owner, name, "tree", revision, *_]:
                files = self.server.commits[self._commit_of(f"{owner}/{name}", revision)]
                self._answer([_entry(path, content) for path, content in files.items()])
            case [owner, name, "resolve", revision, *path]:
                found = self._commit_of(f"{owner}/{name}", revision)
                content = self.server.commits[found]["/".join(path)]
                if self.command == "GET":
                    self.server.downloads["/".join((found, *path))] += 1
                self._answer(content, 200, {"X-Repo-Commit": found, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
            case _:
                self._answer({"error": self.path}, 404)

    do_HEAD = do_GET  # noqa: N815 - the base class's name

    def _commit_of(self, repository: str, revision: str) -> str:
        return self.server.newest.get(repository, "") if revision == "main" else revision

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Tells nothing."""


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers within a block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
