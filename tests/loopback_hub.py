"""A Hub on a loopback port, in the protocol `huggingface_hub` speaks: repositories that are read, made and written.

    with serve_hub({"models/someone/model": folder}) as endpoint:  # to read from
        subprocess.run(..., env={..., "HF_ENDPOINT": endpoint})

    with LoopbackHub() as hub:  # to write to, as the user `someone`
        hub.fail("POST", "/commit/", 409)  # once
        api = HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)

Large files go by LFS with the basic transfer: set HF_HUB_DISABLE_XET=1. Every request is kept in `hub.requests`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

OWNER = "someone"
WRITE_TOKEN = "hf_" + "loopbackWrite".ljust(34, "0")
READ_TOKEN = "hf_" + "loopbackRead".ljust(34, "0")
TOKENS = {WRITE_TOKEN: "write", READ_TOKEN: "read"}
LFS_SUFFIXES = {".safetensors", ".pt", ".pth", ".png", ".bin", ".parquet"}  # as in a new repository's .gitattributes


@contextmanager
def serve_hub(repositories: Mapping[str, Path]) -> Iterator[str]:
    """Serve `repositories`: "models/owner/name" or "datasets/owner/name" to folder. Yields the endpoint's address."""
    with LoopbackHub() as hub:
        for name, folder in repositories.items():
            hub.add(name, folder)
        yield hub.endpoint


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Repository:
    name: str  # models/owner/name
    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.name.split("/", 1)[1]

    def commit(self, files: dict[str, File], message: str, branch: str = "main") -> str:
        oid = hashlib.sha1(repr((self.name, len(self.commits), message)).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        named = self.branches.get(revision) or self.tags.get(revision) or revision
        return named if named in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path to content."""
        return {path: file.content for path, file in self.commits[self.resolve(revision) or ""].items()}


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """An answer that is not the Hub's own."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


How = int | str | Reply | Callable[[], object]


@dataclass
class Fault:
    method: str
    part: str  # of the path
    how: How
    times: int


class LoopbackHub:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.released = threading.Event()
        self.lock = threading.RLock()

    def __enter__(self) -> LoopbackHub:
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(timeout=5)

    def add(self, name: str, folder: Path | None = None, private: bool = False) -> Repository:
        """A repository with a folder's files, or with what a new one holds."""
        paths = [path for path in folder.rglob("*") if path.is_file()] if folder else []
        files = {path.relative_to(folder).as_posix(): as_file(path.name, path.read_bytes()) for path in paths if folder}
        repository = self.repositories[name] = Repository(name, private)
        repository.commit(files or {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        return repository

    def fail(self, method: str, part: str, how: How, times: int = 1) -> None:
        """Let the next requests of `method` with `part` in their path fail.

        With an HTTP state, or a `Reply`; "refused", the connection ends before a byte is read; "cut", in the middle of
        the body; "lost", the request is obeyed and the answer never arrives; "silent", nothing is obeyed or answered
        until `released` is set; "drip", an answer begins and does not end until then; or "hold", it waits until then,
        and is obeyed. A function is called first.
        """
        self.faults.append(Fault(method, part, how, times))

    def sent(self, method: str, part: str) -> list[Request]:
        return [request for request in self.requests if request.method == method and part in request.path]

    def take_fault(self, method: str, path: str) -> How | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.part in path:
                    fault.times -= 1
                    return fault.how
        return None


def as_file(name: str, content: bytes) -> File:
    return File(content, Path(name).suffix in LFS_SUFFIXES and bool(content))


class RefusedError(Exception):
    def __init__(self, status: int, code: str, message: str, **more: object) -> None:
        self.status, self.code, self.message, self.more = status, code, message, more


class Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub

    def handle_request(self) -> None:
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        how = self.hub.take_fault(self.command, path)
        if how == "refused":
            return self.connection.shutdown(socket.SHUT_RDWR)
        if how == "cut":
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            return self.connection.shutdown(socket.SHUT_RDWR)
        body = self.read_body()
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, self.path, dict(self.headers), body))
        if how == "hold":
            self.hub.released.wait(timeout=60)
        if how == "silent":
            self.hub.released.wait(timeout=60)
            return self.connection.shutdown(socket.SHUT_RDWR)
        if how == "drip":
            return self.drip()
        if isinstance(how, Reply):
            return self.answer(how.body, how.status, how.headers)
        if callable(how):
            how()
        if isinstance(how, int):
            return self.answer({"error": "a fault for the test"}, status=how)
        try:
            with self.hub.lock:
                content, headers = self.route(path, query, body)
        except RefusedError as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            return self.answer({"error": refused.message, **refused.more}, refused.status, headers)
        if how == "lost":
            return self.connection.shutdown(socket.SHUT_RDWR)
        return self.answer(content, headers=headers)

    def drip(self) -> None:
        """The beginning of an answer, a byte now and then."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        with suppress(OSError):  # the client has given up
            while not self.hub.released.wait(timeout=0.02):
                self.wfile.write(b" ")
                self.wfile.flush()

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def route(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[Any, dict[str, str]]:
        """What to answer: JSON or bytes, and headers."""
        role = self.role()
        if path == "/api/repos/create":
            return self.create(role, json.loads(body)), {}
        if path == "/api/validate-yaml":
            return self.validate_card(json.loads(body)["content"]), {}
        if found := re.fullmatch(r"/lfs/(\w{64})", path):
            if hashlib.sha256(body).hexdigest() != found[1]:
                raise RefusedError(400, "", "the object is not what it was announced as")
            self.hub.objects[found[1]] = body
            return {}, {}
        if path == "/lfs/verify":
            if json.loads(body)["oid"] not in self.hub.objects:
                raise RefusedError(404, "", "no such object")
            return {}, {}
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.repository(f"models/{found[1]}", role, write=True)
            return {"transfer": "basic", "objects": [self.lfs_object(one) for one in json.loads(body)["objects"]]}, {}
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository = self.repository(f"{found[1] or 'models/'}{found[2]}", role)
            return self.file(repository, found[3], found[4])
        if found := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/([^/]+))?(?:/(.+))?", path):
            writes = found[2] in ("preupload", "commit", "branch", "tag") or found[3] == "write"
            repository = self.repository(found[1], role, write=writes)
            return self.api(repository, found[2] or "revision", found[3] or "main", query, body), {}
        raise RefusedError(404, "RepoNotFound", "Repository not found")

    def role(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise RefusedError(401, "", "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def repository(self, name: str, role: str | None, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and role is None):
            raise RefusedError(401 if role is None else 404, "RepoNotFound", "Repository not found")
        if write:
            self.check_may_write(role, repository.id.split("/")[0])
        return repository

    def check_may_write(self, role: str | None, owner: str) -> None:
        if role is None:
            raise RefusedError(401, "", "Invalid username or password.")
        if role != "write" or owner != OWNER:
            raise RefusedError(403, "", f"You don't have the rights to write under the namespace {owner!r}")

    def create(self, role: str | None, wanted: dict[str, Any]) -> dict[str, Any]:
        name = f"{wanted.get('type', 'model')}s/{wanted['organization'] or OWNER}/{wanted['name']}"
        self.check_may_write(role, name.split("/")[1])
        url = f"{self.hub.endpoint}/{name.removeprefix('models/')}"
        if name in self.hub.repositories:
            raise RefusedError(409, "", "You already created this model repo", url=url)
        self.hub.add(name, private="private" in (wanted.get("visibility"), wanted.get("private") and "private"))
        return {"url": url}

    def validate_card(self, content: str) -> dict[str, list]:
        front = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            if front and not isinstance(yaml.safe_load(front[1]), dict):
                raise ValueError("no mapping")
        except (ValueError, yaml.YAMLError) as error:
            raise RefusedError(400, "", "invalid metadata", errors=[{"message": str(error)}]) from error
        return {"errors": [], "warnings": []}

    def lfs_object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.hub.objects:
            return wanted
        actions = {"upload": f"lfs/{wanted['oid']}", "verify": "lfs/verify"}
        return {**wanted, "actions": {name: {"href": f"{self.hub.endpoint}/{path}"} for name, path in actions.items()}}

    def file(self, repository: Repository, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        commit = self.commit_of(repository, revision)
        file = repository.commits[commit].get(path)
        if file is None:
            raise RefusedError(404, "EntryNotFound", "Entry not found")
        return file.content, {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"'}

    def commit_of(self, repository: Repository, revision: str) -> str:
        commit = repository.resolve(revision)
        if commit is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def api(self, repository: Repository, what: str, rest: str, query: dict[str, list[str]], body: bytes) -> Any:
        if what == "auth-check":
            return {}
        if what == "branch":
            if rest in repository.branches:
                raise RefusedError(409, "", "Reference already exists")
            start = json.loads(body).get("startingPoint", "main")
            repository.branches[rest] = self.commit_of(repository, start)
            return {}
        revision, _, folder = rest.partition("/")
        commit = self.commit_of(repository, revision)
        files = repository.commits[commit]
        match what:
            case "revision":
                siblings = [sibling(path, file) for path, file in files.items()]
                return {"id": repository.id, "sha": commit, "private": repository.private, "siblings": siblings}
            case "refs":
                heads, tags = refs("heads", repository.branches), refs("tags", repository.tags)
                return {"branches": heads, "tags": tags, "converts": []}
            case "tree":
                return tree(files, folder, query.get("recursive", ["false"])[0].lower() == "true")
            case "paths-info":
                wanted = parse_qs(body.decode())["paths"]
                return [entry(path, files[path]) for path in wanted if path in files]
            case "tag":
                tag = json.loads(body)["tag"]
                if tag in repository.tags:
                    raise RefusedError(409, "", "Reference already exists")
                repository.tags[tag] = commit
                return {}
            case "preupload":
                return {"files": [upload_mode(one, files) for one in json.loads(body)["files"]]}
            case "commit":
                return self.commit(repository, revision, dict(files), body)
        raise RefusedError(404, "", f"this Hub has no {what}")

    def commit(self, repository: Repository, branch: str, files: dict[str, File], body: bytes) -> dict[str, Any]:
        message = ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    message = value["summary"]
                    if value.get("parentCommit") not in (None, repository.branches[branch]):
                        raise RefusedError(412, "", "A commit has happened since. Please refresh and try again.")
                case "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
                case "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        raise RefusedError(400, "", f"the LFS object of {value['path']} was not uploaded")
                    files[value["path"]] = File(self.hub.objects[value["oid"]], lfs=True)
                case "deletedFile":
                    del files[value["path"]]
        oid = repository.commit(files, message, branch)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repository.id}/commit/{oid}"}

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        is_file = isinstance(content, bytes)
        data = content if is_file else json.dumps(content).encode()
        headers = dict(headers or {}) | {"Content-Type": "application/octet-stream" if is_file else "application/json"}
        if is_file and (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            start, end = int(asked[1]), int(asked[2] or len(data) - 1)
            status, headers["Content-Range"] = 206, f"bytes {start}-{end}/{len(data)}"
            data = data[start : end + 1]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def refs(kind: str, commits: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit} for name, commit in commits.items()]


def tree(files: Mapping[str, File], folder: str, recursive: bool) -> list[dict[str, Any]]:
    below = {path: file for path, file in files.items() if not folder or path.startswith(f"{folder}/")}
    if folder and not below:
        raise RefusedError(404, "EntryNotFound", f"{folder} does not exist")
    entries = {}
    for path, file in below.items():
        parts = path.split("/")
        depth = folder.count("/") + 2 if folder else 1
        for end in range(depth, len(parts)):
            parent = "/".join(parts[:end])
            entries[parent] = {"type": "directory", "path": parent, "oid": hashlib.sha1(parent.encode()).hexdigest()}
            if not recursive:
                break
        if recursive or len(parts) == depth:
            entries[path] = entry(path, file)
    return list(entries.values())


def entry(path: str, file: File) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.git_oid}
    if file.lfs:
        found["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
    return found


def sibling(path: str, file: File) -> dict[str, Any]:
    found = {"rfilename": path, "size": len(file.content), "blobId": file.git_oid}
    return found | ({"lfs": {"sha256": file.sha256, "size": found["size"], "pointerSize": 134}} if file.lfs else {})


def upload_mode(wanted: dict[str, Any], files: Mapping[str, File]) -> dict[str, Any]:
    path = wanted["path"]
    mode = "lfs" if Path(path).suffix in LFS_SUFFIXES or wanted["size"] > 10_000_000 else "regular"
    return {
        "path": path, "uploadMode": mode, "shouldIgnore": False, "oid": files[path].oid if path in files else None,
    }  # fmt: skip
