"""A small Hub on this machine: the calls that ``huggingface_hub`` makes to create a repository, commit to it and read it.

Commits are as on the Hub: all operations of one call, or none. Large files go through the LFS calls (batch, upload, verify),
others are in the commit itself. A test sets faults.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

USERS = {"hf_owner": "user", "hf_guest": "guest"}
"""Token -> the name of its user."""


@dataclass
class Repository:
    """Branches are commits' names; a commit is its files by path."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, files: dict[str, bytes]) -> str:
        """Adds a commit to a branch."""
        text = json.dumps(
            [len(self.commits), branch, sorted((p, hashlib.sha1(c).hexdigest()) for p, c in files.items())]
        )
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def commit_of(self, revision: str) -> str | None:
        """The commit that a revision names."""
        return revision if revision in self.commits else self.branches.get(revision)


class Hub(ThreadingHTTPServer):
    """The server: ``repositories`` by name, the ``calls`` that came, and ``faults``: part of a path -> status, or ``cut``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.faults: dict[str, int | str] = {}
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository."""
        repository = self.repositories[name]
        return repository.commits[repository.commit_of(revision) or ""]

    def put(self, name: str, files: dict[str, bytes], *, private: bool = False) -> str:
        """A repository with one commit."""
        self.repositories[name] = Repository(private)
        return self.repositories[name].add("main", {".gitattributes": b"", **files})


class _Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.calls.append(f"{self.command} {path}")
        fault = next((f for part, f in self.server.faults.items() if part in f"{self.command} {path}"), None)
        try:
            if isinstance(fault, int):
                raise _Refused(fault, "a fault of the test")
            for method, pattern, action in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    return self._send(*action(self, body, *match.groups()), cut=fault == "cut")
            raise _Refused(404, f"no route for {self.command} {path}")
        except _Refused as refused:
            self._send(refused.status, refused.headers, json.dumps({"error": str(refused)}).encode())

    def _send(self, status: int, headers: dict[str, str], content: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    # -- who asks ----------------------------------------------------------------------------------------------------

    def _user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return USERS.get(token)

    def _readable(self, name: str) -> Repository:
        user, repository = self._user(), self.server.repositories.get(name)
        if repository is None or (repository.private and user != name.split("/")[0]):
            raise _Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository

    def _writable(self, name: str) -> Repository:
        repository, user = self._readable(name), self._user()
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        if user != name.split("/")[0]:
            raise _Refused(403, "you need to be a member of this user")
        return repository

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self._readable(name)
        sha = repository.commit_of(revision)
        if sha is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]

    # -- answers -----------------------------------------------------------------------------------------------------

    def create(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        asked, user = json.loads(body), self._user()
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        owner = asked.get("organization") or user
        if owner != user:
            raise _Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}".')
        name = f"{owner}/{asked['name']}"
        if name in self.server.repositories:
            headers = {"X-Error-Message": "You already created this model repo"}
            return 409, headers, _json({"url": f"{self.server.url}/{name}"})[2]
        self.server.put(name, {}, private=asked.get("private") is True or asked.get("visibility") == "private")
        return _json({"url": f"{self.server.url}/{name}"})

    def info(self, body: bytes, name: str, revision: str | None) -> tuple[int, dict[str, str], bytes]:
        sha, files = self._files(name, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        private = self.server.repositories[name].private
        return _json({"id": name, "modelId": name, "sha": sha, "private": private, "siblings": siblings, "tags": []})

    def branch(self, body: bytes, name: str, branch: str) -> tuple[int, dict[str, str], bytes]:
        repository = self._writable(name)
        if branch in repository.branches:
            raise _Refused(409, "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return _json({})

    def yaml(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        wrong = "license: unknown-here" in json.loads(body)["content"]
        errors = [{"message": '"license" must be one of [mit]'}] if wrong else []
        return 400 if wrong else 200, {}, _json({"errors": errors, "warnings": []})[2]

    def preupload(self, body: bytes, name: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        self._writable(name)
        _, files = self._files(name, revision)
        modes = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                **({"oid": _etag(f["path"], files[f["path"]])} if f["path"] in files else {}),
            }
            for f in json.loads(body)["files"]
        ]
        return _json({"files": modes})

    def batch(self, body: bytes, name: str) -> tuple[int, dict[str, str], bytes]:
        self._writable(name)
        objects = []
        for asked in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.server.url}/large/{asked['oid']}"},
                "verify": {"href": f"{self.server.url}/verify"},
            }
            objects.append(asked if asked["oid"] in self.server.large else {**asked, "actions": actions})
        return _json({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> tuple[int, dict[str, str], bytes]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "the content has another checksum")
        self.server.large[oid] = body
        return 200, {}, b""

    def verify(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        asked = json.loads(body)
        if len(self.server.large.get(asked["oid"], b"")) != asked["size"]:
            raise _Refused(404, "no such object")
        return _json({})

    def commit(self, body: bytes, name: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        repository = self._writable(name)
        _, files = self._files(name, revision)
        files = dict(files)
        for line in body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = repository.add(revision, files)
        return _json({"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        sha, files = self._files(name, revision)
        if path not in files:
            refused = _Refused(404, "Entry not found", "EntryNotFound")
            refused.headers["X-Repo-Commit"] = sha
            raise refused
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_etag(path, files[path])}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return 200, headers, files[path]
        start, size = int(asked[1]), len(files[path])
        end = min(int(asked[2] or size - 1), size - 1)
        return 206, {**headers, "Content-Range": f"bytes {start}-{end}/{size}"}, files[path][start : end + 1]


def _etag(path: str, content: bytes) -> str:
    """The SHA-256 of a large file, git's SHA-1 of another."""
    if path.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _json(content: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


_NAME = "([^/]+/[^/]+)"
_ROUTES: list[tuple[tuple[str, ...], str, Any]] = [
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.yaml),
    (("GET",), f"/api/models/{_NAME}(?:/revision/(.+))?", _Handler.info),
    (("POST",), f"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    (("POST",), f"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (("POST",), f"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), "/large/([0-9a-f]+)", _Handler.store),
    (("POST",), "/verify", _Handler.verify),
    (("GET", "HEAD"), f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
