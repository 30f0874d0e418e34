"""A read-only Hub on a loopback port: serves folders as repositories, in the protocol `huggingface_hub` speaks.

Used in-process by the tests::

    with serve_hub({"models/someone/model": folder}) as endpoint:
        subprocess.run(..., env={..., "HF_ENDPOINT": endpoint})
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(repositories: Mapping[str, Path]) -> Iterator[str]:
    """Serve `repositories`: "models/owner/name" or "datasets/owner/name" to folder. Yields the endpoint's address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            for name, folder in repositories.items():
                kind, repo_id = name.split("/", 1)
                files_at = f"{repo_id if kind == 'models' else name}/resolve/"
                if path.startswith(f"api/{name}/tree/"):
                    return self.send_json([entry(folder, file) for file in files_of(folder)])
                if path in (f"api/{name}", f"api/{name}/revision/main", f"api/{name}/revision/{COMMIT}"):
                    siblings = [{"rfilename": file} for file in files_of(folder)]
                    return self.send_json({"id": repo_id, "sha": COMMIT, "private": False, "siblings": siblings})
                if path.startswith(files_at):
                    return self.send_file(folder / path[len(files_at) :].split("/", 1)[1])
            return self.send_missing()

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            for name, folder in repositories.items():
                if self.path.startswith(f"/api/{name}/paths-info/"):
                    return self.send_json([entry(folder, file) for file in files_of(folder) if file in unquote(body)])
            return self.send_missing()

        def send_json(self, content: object) -> None:
            self.send_bytes(json.dumps(content).encode(), "application/json")

        def send_file(self, path: Path) -> None:
            if not path.is_file():
                return self.send_missing()
            return self.send_bytes(path.read_bytes(), "application/octet-stream", etag=etag(path))

        def send_bytes(self, content: bytes, kind: str, etag: str = "") -> None:
            self.send_response(200)
            for header, value in (("Content-Type", kind), ("X-Repo-Commit", COMMIT), ("ETag", f'"{etag}"')):
                self.send_header(header, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def send_missing(self) -> None:
            self.send_response(404)
            is_known = any(name.split("/", 1)[1] in self.path for name in repositories)
            self.send_header("X-Error-Code", "EntryNotFound" if is_known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def entry(folder: Path, file: str) -> dict:
    return {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": etag(folder / file)}


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
