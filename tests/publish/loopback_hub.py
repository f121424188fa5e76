"""A model hub on the loopback: enough for the real clients, and faults on demand. Nothing is kept on disk.

Commits, branches, tags and pull requests of `Repo`s live in memory. Weights travel by LFS: a client asks for
an address, puts the bytes, and commits their sha256. Where `Hub.xet` is a folder, hf_xet writes its chunks there.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from loopback import Listening

TOKEN = "hf_loopbackSecretThatMustNeverShow"
LARGE = (".safetensors", ".png", ".npz")


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclasses.dataclass(frozen=True)
class File:
    """`data` is None of what went through Xet, whose bytes the hub never sees."""

    oid: str
    size: int
    data: bytes | None
    large: bool


@dataclasses.dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, File]] = dataclasses.field(default_factory=dict)
    titles: list[str] = dataclasses.field(default_factory=list)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    tags: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, branch: str, title: str, files: dict[str, File]) -> str:
        sha = hashlib.sha1(f"{len(self.titles)} {title}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.titles.append(title)
        return sha

    def sha(self, revision: str) -> str | None:
        return (
            self.branches.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)
        )

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.sha(revision) or ""]


@dataclasses.dataclass
class Answer:
    status: int = 200
    body: Any = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


def refusal(status: int, code: str = "", message: str = "") -> Answer:
    """What makes huggingface_hub raise this or that error is the header, more than the number."""
    headers = {"X-Error-Code": code} if code else {}
    return Answer(status, {"error": message}, {**headers, **({"X-Error-Message": message} if message else {})})


CUT = Answer(0)
"""Hangs up after a few bytes of the request's body."""


class Hub(Listening):
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[tuple[re.Pattern[str], list[Answer], list[int]]] = []
        self.asked: list[str] = []
        self.reads_need_token = False
        self.spoils: str | None = None  # a file whose bytes rot on the way in, unnoticed by the hub
        self.xet: Path | None = None
        self.lock, hub = threading.RLock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()

            def serve(self) -> None:
                hub.handle(self)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(Handler)

    def fail(self, request: str, *answers: Answer, times: int = 1) -> None:
        """The next `times` requests whose `METHOD /path` matches get `answers`, one after the other."""
        self.faults.append((re.compile(request), list(answers), [times]))

    def put(self, repo: str, **texts: str) -> str:
        """A repository that others made: `put("org/base", README_md="...")`."""
        files = {}
        for name, text in texts.items():
            data = text.encode()
            files[name.replace("_", ".")] = File(git_oid(data), len(data), data, False)
        return self.repos.setdefault(repo, Repo()).add("main", "by hand", files)

    # -------------------------------------------------------------------------------------------------------- requests

    def handle(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        request = f"{handler.command} {urlsplit(handler.path).path}"
        with self.lock:
            self.asked.append(request)
            fault = self._fault(request)
        if fault is CUT:
            handler.rfile.read(min(1024, int(handler.headers.get("Content-Length") or 1)))
            handler.close_connection = True
            handler.connection.close()
            return
        body = _body(handler)
        with self.lock:
            answer = fault or self._answer(handler, body)
        data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        handler.send_response(answer.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **answer.headers}
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(data)

    def _fault(self, request: str) -> Answer | None:
        for pattern, answers, left in self.faults:
            if left[0] and pattern.search(request):
                left[0] -= 1
                return answers.pop(0) if len(answers) > 1 else answers[0]
        return None

    def _answer(self, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> Answer:
        url = urlsplit(handler.path)
        if not self._may(handler, url.path):
            return refusal(401, "RepoNotFound", "Invalid username or password.")
        for method, pattern, route in ROUTES:
            found = re.fullmatch(pattern, url.path)
            if found and handler.command in method.split():
                given = {name: unquote(text) for name, text in found.groupdict().items()}
                if "repo" in given and given["repo"] not in self.repos:
                    return refusal(404, "RepoNotFound", "Repository not found")
                return route(self, body, parse_qs(url.query), **given)
        return refusal(404, message=f"no route {handler.command} {url.path}")

    def _may(self, handler: http.server.BaseHTTPRequestHandler, path: str) -> bool:
        known = handler.headers.get("Authorization") == f"Bearer {TOKEN}"
        reads = handler.command in ("GET", "HEAD") and not path.startswith("/api/whoami")
        return known or path.startswith("/lfs/") or (reads and not self.reads_need_token)

    # ----------------------------------------------------------------------------------------------------------- routes

    def create(self, body: bytes, query: dict) -> Answer:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repos:
            return Answer(409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"})
        self.repos[name] = Repo(asked.get("visibility") == "private")
        data = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.repos[name].add("main", "initial commit", {".gitattributes": File(git_oid(data), len(data), data, False)})
        return Answer(body={"url": f"{self.url}/{name}", "name": name})

    def whoami(self, body: bytes, query: dict) -> Answer:
        return Answer(body={"type": "user", "name": "org", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_card(self, body: bytes, query: dict) -> Answer:
        text = json.loads(body)["content"]
        header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        try:
            facts = yaml.safe_load(header[1]) if header else {}
        except yaml.YAMLError as error:
            return Answer(400, {"errors": [{"message": f"not YAML: {error}"}], "warnings": []})
        errors = [] if isinstance(facts, dict) else ["the metadata is no mapping"]
        if facts.get("license") == "other" and not (facts.get("license_name") and facts.get("license_link")):
            errors.append("license: other needs license_name and license_link")
        answer = {"errors": [{"message": text} for text in errors], "warnings": []}
        return Answer(400 if errors else 200, answer)

    def info(self, body: bytes, query: dict, repo: str, revision: str = "main") -> Answer:
        sha = self.repos[repo].sha(revision)
        if sha is None:
            return refusal(404, "RevisionNotFound", "Invalid rev id")
        files = self.repos[repo].commits[sha]
        facts = {
            "id": repo,
            "modelId": repo,
            "sha": sha,
            "private": self.repos[repo].private,
            "tags": [],
            "downloads": 0,
        }
        return Answer(body={**facts, "likes": 0, "siblings": [{"rfilename": name} for name in files]})

    def refs(self, body: bytes, query: dict, repo: str) -> Answer:
        def listed(kind: str, found: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in found.items()]

        branches = {name: sha for name, sha in self.repos[repo].branches.items() if not name.startswith("refs/")}
        tags = listed("tags", self.repos[repo].tags)
        return Answer(body={"branches": listed("heads", branches), "converts": [], "tags": tags})

    def tree(self, body: bytes, query: dict, repo: str, revision: str) -> Answer:
        sha = self.repos[repo].sha(revision)
        if sha is None:
            return refusal(404, "RevisionNotFound", "Invalid rev id")
        return Answer(body=[_entry(name, file) for name, file in sorted(self.repos[repo].commits[sha].items())])

    def preupload(self, body: bytes, query: dict, repo: str, revision: str) -> Answer:
        sha = self.repos[repo].sha(revision)
        if sha is None:
            return refusal(404, "RevisionNotFound", "Invalid rev id")
        now = self.repos[repo].commits[sha]
        files = [
            {
                "path": asked["path"],
                "uploadMode": "lfs" if asked["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": now[asked["path"]].oid if asked["path"] in now else None,
            }
            for asked in json.loads(body)["files"]
        ]
        return Answer(body={"files": files})

    def lfs_batch(self, body: bytes, query: dict, repo: str) -> Answer:
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"href": f"{self.url}/lfs/{asked['oid']}"}
            verify = {"href": f"{self.url}/lfs/verify"}
            known = asked["oid"] in self.blobs
            objects.append({**asked, **({} if known else {"actions": {"upload": upload, "verify": verify}})})
        return Answer(body={"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, query: dict, oid: str) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return Answer(422, {"error": "the content does not have the announced sha256"})
        self.blobs[oid] = body
        return Answer()

    def lfs_verify(self, body: bytes, query: dict) -> Answer:
        asked = json.loads(body)
        known = len(self.blobs.get(asked["oid"], b"")) == asked["size"]
        return Answer(body={}) if known else refusal(404, message="no such object")

    def xet_token(self, body: bytes, query: dict, repo: str, revision: str) -> Answer:
        if self.xet is None:
            return refusal(404, message="no Xet storage here")
        told = {"casUrl": f"local://{self.xet}", "accessToken": "short-lived", "exp": 4_000_000_000}
        headers = {"X-Xet-Cas-Url": told["casUrl"], "X-Xet-Access-Token": "short-lived"}
        return Answer(body=told, headers={**headers, "X-Xet-Token-Expiration": str(told["exp"])})

    def commit(self, body: bytes, query: dict, repo: str, revision: str) -> Answer:
        known = self.repos[repo]
        header, *operations = (json.loads(line) for line in body.splitlines())
        head = known.sha(revision)
        if head is None:
            return refusal(404, "RevisionNotFound", "Invalid rev id")
        if header["value"].get("parentCommit") not in (None, head):
            return refusal(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(known.commits[head])
        for operation in operations:
            value = operation["value"]
            match operation["key"]:
                case "file":
                    data = base64.b64decode(value["content"])
                    files[value["path"]] = File(git_oid(data), len(data), data, False)
                case "lfsFile":
                    data = self.blobs.get(value["oid"])
                    if data is None and self.xet is None:
                        return refusal(400, message=f"the object {value['oid']} was not uploaded")
                    files[value["path"]] = File(value["oid"], value["size"], data, True)
                case "deletedFile":
                    files.pop(value["path"])
        if self.spoils in files:
            files[self.spoils] = dataclasses.replace(files[self.spoils], oid="0" * 64)
        pulls = "create_pr" in query
        branch = f"refs/pr/{sum(name.startswith('refs/pr') for name in known.branches) + 1}" if pulls else revision
        sha = known.add(branch, header["value"]["summary"], files)
        answer = {"commitOid": sha, "commitUrl": f"{self.url}/{repo}/commit/{sha}"}
        return Answer(body={**answer, "pullRequestUrl": f"{self.url}/{repo}/discussions/1" if pulls else None})

    def branch(self, body: bytes, query: dict, repo: str, name: str) -> Answer:
        if name in self.repos[repo].branches:
            return Answer(409, {"error": "Reference already exists"})
        self.repos[repo].branches[name] = self.repos[repo].branches["main"]
        return Answer(body={})

    def tag(self, body: bytes, query: dict, repo: str, revision: str) -> Answer:
        tag, sha = json.loads(body)["tag"], self.repos[repo].sha(revision)
        if sha is None:
            return refusal(404, "RevisionNotFound", "Invalid rev id")
        if tag in self.repos[repo].tags:
            return Answer(409, {"error": "Tag reference exists already"})
        self.repos[repo].tags[tag] = sha
        return Answer(body={})

    def resolve(self, body: bytes, query: dict, repo: str, revision: str, path: str) -> Answer:
        sha = self.repos[repo].sha(revision)
        if sha is None:
            return refusal(404, "RevisionNotFound", "Invalid rev id")
        file = self.repos[repo].commits[sha].get(path)
        if file is None or file.data is None:
            answer = refusal(404, "EntryNotFound", "Entry not found")
            return dataclasses.replace(answer, headers={**answer.headers, "X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"', "Content-Type": "application/octet-stream"}
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(file.size)}
        return Answer(body=file.data, headers=headers)


REPO, REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES: tuple[tuple[str, str, Callable[..., Answer]], ...] = (
    ("POST", "/api/repos/create", Hub.create),
    ("GET", "/api/whoami-v2", Hub.whoami),
    ("POST", "/api/validate-yaml", Hub.validate_card),
    ("GET", f"/api/models/{REPO}", Hub.info),
    ("GET", f"/api/models/{REPO}/revision/{REVISION}", Hub.info),
    ("GET", f"/api/models/{REPO}/refs", Hub.refs),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}", Hub.tree),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", Hub.preupload),
    ("GET", f"/api/models/{REPO}/xet-write-token/{REVISION}", Hub.xet_token),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", Hub.commit),
    ("POST", f"/api/models/{REPO}/branch/(?P<name>.+)", Hub.branch),
    ("POST", f"/api/models/{REPO}/tag/{REVISION}", Hub.tag),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("POST", "/lfs/verify", Hub.lfs_verify),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Hub.lfs_put),
    ("GET HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Hub.resolve),
)


def _body(handler: http.server.BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("Transfer-Encoding") != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    parts = []
    while size := int(handler.rfile.readline(), 16):
        parts.append(handler.rfile.read(size))
        handler.rfile.readline()
    handler.rfile.readline()
    return b"".join(parts)


def _entry(name: str, file: File) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "oid": file.oid, "size": file.size}
    if file.large:
        entry |= {"oid": git_oid(file.oid.encode()), "lfs": {"oid": file.oid, "size": file.size, "pointerSize": 133}}
    return entry
