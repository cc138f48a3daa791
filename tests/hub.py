"""A Hugging Face hub on loopback: what huggingface_hub asks when it publishes and downloads, files in memory.

Written from huggingface_hub's own requests; it shows that our calls are right, not that the real hub agrees.
"""

# ruff: noqa: N802 - http.server gives the names

import base64
import hashlib
import json
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from urllib.parse import unquote, urlsplit

from tests.servers import Handler, Loopback, serving

TOKEN = "hf_onlyForThisTest"
Run = Callable[..., subprocess.CompletedProcess[str]]
"""A command of ours, started where the hub is this one."""


class Hub(Loopback):
    """`repos`: ("models/owner/name", or "datasets/...") -> path -> bytes; `commits` of each repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[str]] = defaultdict(list)
        self.blobs: dict[str, bytes] = {}
        self.gated: set[str] = set()
        """Repositories whose files are for those who have accepted their terms: here, nobody."""
        self.tokens: set[str | None] = set()
        self.unknown: list[str] = []

    def sha(self, repo: str) -> str:
        return hashlib.sha1(f"{repo} {len(self.commits[repo])}".encode()).hexdigest()


def running() -> AbstractContextManager[Hub]:
    return serving(Hub())


class _Handler(Handler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            self._with_repo(f"{match[1]}/{match[2]}", self._info)
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?", path):
            deep = "recursive=True" in self.path or "recursive=true" in self.path
            self._with_repo(f"{match[1]}/{match[2]}", self._tree, match[3] or "", deep)
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.*)", path):
            self._with_repo(f"{match[1] or 'models/'}{match[2]}", self._file, match[3])
        elif path == "/api/agent-harnesses":
            self._json([])
        else:
            self._unknown()

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._json({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            request = json.loads(body)
            repo = f"{request.get('type') or 'model'}s/{request['organization']}/{request['name']}"
            status = 409 if repo in self.server.repos else 200
            self.server.repos.setdefault(repo, {})
            self._json({"url": f"{self.server.url}/{repo.removeprefix('models/')}"}, status)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/preupload/[^/]+", path):
            self._with_repo(f"{match[1]}/{match[2]}", self._preupload, body)
        elif match := re.fullmatch(r"/(?:datasets/)?[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            self._batch(body)
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/commit/[^/]+", path):
            self._with_repo(f"{match[1]}/{match[2]}", self._commit, body)
        else:
            self._unknown()

    def do_PUT(self) -> None:
        body = self._body()
        self.server.blobs[hashlib.sha256(body).hexdigest()] = body
        self.send(200, b"")

    def _with_repo(self, repo: str, answer, *arguments: object) -> None:
        self.server.tokens.add(self.headers["Authorization"])
        if repo in self.server.repos:
            answer(repo, *arguments)
        else:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def _info(self, repo: str) -> None:
        name = repo.split("/", 1)[1]
        self._json(
            {"id": name, "modelId": name, "sha": self.server.sha(repo), "private": False, "siblings": []}
        )

    def _tree(self, repo: str, folder: str, deep: bool) -> None:
        entries, start = [], f"{folder}/" if folder else ""
        for path, data in self.server.repos[repo].items():
            name, _, below = path.removeprefix(start).partition("/")
            if not path.startswith(start):
                continue
            if deep or not below:
                entries.append({"type": "file", "path": path, "size": len(data), "oid": _oid(data)})
            if (
                below
                and (line := {"type": "directory", "path": start + name, "oid": "0" * 40}) not in entries
            ):
                entries.append(line)
        self._json(entries)

    def _file(self, repo: str, path: str) -> None:
        if repo in self.server.gated:
            self._json({"error": "Access is restricted"}, 403, {"X-Error-Code": "GatedRepo"})
            return
        if path not in self.server.repos[repo]:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        data = self.server.repos[repo][path]
        etag = f'"{_oid(data)}"'
        self.send(200, data, {"ETag": etag, "X-Repo-Commit": self.server.sha(repo)})

    def _preupload(self, repo: str, body: bytes) -> None:
        """Files above 4 kB go by LFS, as large ones do on the real hub."""
        files = [
            {
                "path": file["path"],
                "shouldIgnore": False,
                "uploadMode": "lfs" if file["size"] > 4096 else "regular",
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def _batch(self, body: bytes) -> None:
        objects = [
            {
                "oid": each["oid"],
                "size": each["size"],
                "actions": {"upload": {"href": f"{self.server.url}/blobs/{each['oid']}"}},
            }
            for each in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def _commit(self, repo: str, body: bytes) -> None:
        files = self.server.repos[repo]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.commits[repo].append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.server.blobs[value["oid"]]
        sha = self.server.sha(repo)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"})

    def _body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _unknown(self) -> None:
        self.server.unknown.append(f"{self.command} {self.path}")
        self._json({"error": "not part of this hub"}, 404)

    def _json(
        self,
        value: object,
        status: int = 200,
        headers: dict[str, str] | None = None,
        kind: str = "application/json",
    ) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": kind} | (headers or {}))


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
