"""A server that plays the Hugging Face hub, and any other server of files."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import pathlib
import re
import threading
from collections.abc import Iterator

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Hub:
    """The repositories, the other files, and what was asked for.

    Attributes:
      repos: {"USER/REPO": {file: content}}; each has the branch main and the tag v1, both at `COMMIT`. Without content
        (None), a file is listed but not there.
      moved: {old: new} names of repositories.
      files: {path: content}, such as {"/net.pth": ...}.
      status: answer to every request for a repository: (status, X-Error-Code), as for a gated one; None: as it should be.
      cut: number of bytes after which the connection is closed during the next download of a large file.
      resumes: whether it honors Range.
      busy: how many times it answers 503 when a download is to be continued.
      requests: "METHOD path range" of each request; its authorization follows if there is one.
    """

    url: str = ""
    repos: dict[str, dict[str, bytes | None]] = dataclasses.field(default_factory=dict)
    moved: dict[str, str] = dataclasses.field(default_factory=dict)
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    status: tuple[int, str] | None = None
    cut: int = 0
    resumes: bool = True
    busy: int = 0
    requests: list[str] = dataclasses.field(default_factory=list)

    def downloads(self) -> list[str]:
        """Returns the ranges of the downloads of large files so far, "" for whole files, and forgets all requests."""
        found = [line.split(" ")[2] for line in self.requests if re.match("GET /(cdn|files)/", line)]
        self.requests.clear()
        return found


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.handle_error = lambda *ignored: None  # of a client that closes a connection
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def used(cache: pathlib.Path) -> Iterator[Hub]:
    """Yields a hub that this process uses, without pauses, with caches below a folder."""
    from huggingface_hub import constants

    from pspnet_jax.weights import download

    with serve() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        patch.setenv("XDG_CACHE_HOME", str(cache / "cache"))
        patch.setenv("HF_TOKEN", "hf_secret")
        patch.setattr(download, "PAUSES", (0, 0))
        yield hub


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        asked = [self.command, path, self.headers.get("Range", ""), self.headers.get("Authorization", "")]
        hub.requests.append(" ".join(asked).rstrip(" ") if asked[-1] else " ".join(asked[:-1]))
        if match := re.fullmatch(r"/files(/.*)|/cdn/(.*)", path):
            return self._send(hub.files.get(match[1] or match[2]))
        if hub.status:
            return self._answer(hub.status[0], {"X-Error-Code": hub.status[1]})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._describe(*match.groups())
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*match.groups())
        self._answer(404)

    def _describe(self, repo: str, revision: str) -> None:
        repo = self.hub.moved.get(repo, repo)
        if repo not in self.hub.repos:
            return self._answer(401, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", "v1", COMMIT):
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name} for name in self.hub.repos[repo]]
        self._answer(200, {"Content-Type": "application/json"}, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}))

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        """Sends a small file; a large one is on another server, and its ETag is its SHA-256."""
        if moved := self.hub.moved.get(repo):
            return self._answer(307, {"Location": f"/{moved}/resolve/{revision}/{name}"})
        if (content := self.hub.repos[repo][name]) is None:
            return self._answer(404, {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": COMMIT}
        if len(content) < 1000:
            etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            return self._answer(200, headers | {"ETag": f'"{etag}"'}, content)
        etag = hashlib.sha256(content).hexdigest()
        self.hub.files[etag] = content
        linked = {
            "X-Linked-ETag": f'"{etag}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{etag}",
        }
        self._answer(302, headers | linked)

    def _send(self, content: bytes | None) -> None:
        if content is None:
            return self._answer(404)
        if self.hub.busy and self.headers.get("Range"):
            self.hub.busy -= 1
            return self._answer(503)
        start, size = 0, len(content)
        if (wanted := self.headers.get("Range")) and self.hub.resumes:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= size:
                return self._answer(416, {"Content-Range": f"bytes */{size}"})
        headers = {"Content-Range": f"bytes {start}-{size - 1}/{size}"} if start else {}
        cut, self.hub.cut = self.hub.cut, 0
        self._answer(206 if start else 200, headers, content[start:], cut)

    def _answer(self, status: int, headers: dict[str, str] | None = None, content: bytes | str = b"", cut: int = 0) -> None:
        content = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:cut] if cut else content)
        self.close_connection = self.close_connection or bool(cut)
