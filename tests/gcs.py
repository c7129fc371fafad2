"""A local emulator of Google Cloud Storage: the part of its JSON API that TensorFlow, tensorstore and google-cloud-storage use.

TensorFlow always connects to googleapis.com, so the server is also an HTTPS proxy that answers in place of that host.
"""

import contextlib
import http.server
import itertools
import json
import pathlib
import re
import socketserver
import ssl
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any, NamedTuple


class Object(NamedTuple):
    content: bytes
    generation: int
    updated: str


class Bucket:
    """The objects of all buckets, with keys "bucket/name"."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self._generations = itertools.count(1)

    def write(self, key: str, content: bytes) -> Object:
        updated = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        self.objects[key] = Object(content, next(self._generations), updated)
        return self.objects[key]

    def upload(self, bucket: str, folder: pathlib.Path) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.write(f"{bucket}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def names(self, prefix: str) -> list[str]:
        return sorted(key for key in self.objects if key.startswith(prefix))


@contextlib.contextmanager
def serve(folder: pathlib.Path) -> Iterator[tuple[Bucket, dict[str, str]]]:
    """Yields the buckets, and the environment variables that point clients to them; writes a certificate to the folder."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subject = ["-subj", "/CN=emulator", "-addext", "subjectAltName=DNS:*.googleapis.com"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command = ["openssl", "req", "-x509", "-days", "2", *kind, *subject]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    bucket = Bucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket, "context": context, "uploads": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield (
            bucket,
            {
                "https_proxy": address,  # TensorFlow's
                "CURL_CA_BUNDLE": str(certificate),
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
                "NO_GCE_CHECK": "true",
                "TENSORSTORE_GCS_HTTP_URL": address,
                "STORAGE_EMULATOR_HOST": address,  # google-cloud-storage's
                "no_proxy": "127.0.0.1",
            },
        )
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket
    context: ssl.SSLContext
    uploads: dict[str, list[Any]]  # {id: [key, bytes so far]}

    def log_message(self, *args: object) -> None:
        pass

    def do_CONNECT(self) -> None:
        """Answers in place of the host that the client wants to reach through the proxy."""
        self.send_response(200)
        self.end_headers()
        self.connection = self.request = self.context.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), socketserver._SocketWriter(self.connection)
        self.close_connection = False

    def parse_request(self) -> bool:
        """Answers requests for the buckets "no-bucket" and "forbidden" with an error."""
        if not super().parse_request():
            return False
        if self.command != "CONNECT" and (found := re.search(r"(?:^|/b)/(no-bucket|forbidden)\b", self.path)):
            self._body()
            self._answer(404 if found[1] == "no-bucket" else 403, {"error": {"message": f"{found[1]}, says the server"}})
            self.wfile.flush()
            self.requestline = self.raw_requestline = b""
            return False
        return True

    def finish(self) -> None:
        super().finish()
        if isinstance(self.connection, ssl.SSLSocket):
            self.connection.close()

    def _answer(self, status: int, content: bytes | dict[str, Any] = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _describe(self, key: str) -> dict[str, Any]:
        bucket, name = key.split("/", 1)
        found = self.bucket.objects[key]
        times = {"updated": found.updated, "timeCreated": found.updated}
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(found.content)),
            "generation": str(found.generation),
            "metageneration": "1",
            **times,
        }

    def _target(self) -> tuple[str, str | None, dict[str, str]]:
        """Returns the bucket, the object (None for all) and the query."""
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        if found := re.fullmatch(r"/(?:upload/|download/)?storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", url.path):
            bucket, name = found[1], found[2]
            if name is None and "/o" not in url.path.split("/b/")[1]:
                query["describe"] = "bucket"
        else:
            bucket, _, name = url.path[1:].partition("/")
            query["alt"] = "media"
        return bucket, urllib.parse.unquote(name) if name else None, query

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        bucket, name, query = self._target()
        if self.path.split("?")[0].endswith("/storageLayout"):  # asked before a folder is renamed
            return self._answer(200, {"kind": "storage#storageLayout", "hierarchicalNamespace": {"enabled": False}})
        if "describe" in query:
            return self._answer(200, {"kind": "storage#bucket", "name": bucket, "id": bucket, "location": "US"})
        if name is None:
            return self._list(bucket, query)
        if (key := f"{bucket}/{name}") not in self.bucket.objects:
            return self._answer(404, {"error": {"code": 404, "message": f"no such object: {key}"}})
        if query.get("alt") != "media":
            return self._answer(200, self._describe(key))
        content, generation, _ = self.bucket.objects[key]
        headers = {"x_goog_generation": str(generation), "ETag": str(generation)}
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304, **headers)
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(found[1]), min(int(found[2] or len(content)) + 1, len(content))
            if start >= len(content):
                return self._answer(416, Content_Range=f"bytes */{len(content)}")
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            return self._answer(206, content[start:stop], **headers)
        return self._answer(200, content, **headers)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        start, items, prefixes = f"{bucket}/{query.get('prefix', '')}", [], {}
        for key in self.bucket.names(start):
            name, delimiter = key.split("/", 1)[1], query.get("delimiter", "")
            rest = key[len(start) :]
            if name < query.get("startOffset", "") or ("endOffset" in query and name >= query["endOffset"]):
                continue
            if delimiter and delimiter in rest:
                prefixes[name[: len(name) - len(rest)] + rest.split(delimiter)[0] + delimiter] = None
            else:
                items.append(self._describe(key))
        return self._answer(200, {"kind": "storage#objects", "items": items, "prefixes": list(prefixes)})

    def _store(self, key: str, content: bytes, query: dict[str, str]) -> None:
        have = str(self.bucket.objects[key].generation) if key in self.bucket.objects else "0"
        if query.get("ifGenerationMatch", have) != have:
            return self._answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        self.bucket.write(key, content)
        return self._answer(200, self._describe(key))

    def do_POST(self) -> None:
        bucket, name, query = self._target()
        body = self._body()
        if name and "/rewriteTo/b/" in name:
            source, target = name.split("/rewriteTo/b/")
            to = target.replace("/o/", "/", 1)
            if (key := f"{bucket}/{source}") not in self.bucket.objects:
                return self._answer(404, {"error": {"code": 404}})
            self.bucket.write(to, self.bucket.objects[key].content)
            return self._answer(200, {"kind": "storage#rewriteResponse", "done": True, "resource": self._describe(to)})
        if query.get("uploadType") == "resumable":
            upload = f"{len(self.uploads)}"
            self.uploads[upload] = [f"{bucket}/{query['name']}", b""]
            return self._answer(200, Location=f"https://www.googleapis.com/upload/storage/v1/b/{bucket}/o?upload_id={upload}")
        return self._store(f"{bucket}/{query['name']}", body, query)

    def do_PUT(self) -> None:
        _, _, query = self._target()
        upload, body = self.uploads[query["upload_id"]], self._body()
        upload[1] += body
        found = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+|\*)", self.headers.get("Content-Range", f"bytes */{len(upload[1])}"))
        assert found, self.headers
        if found[1] != "*" and len(upload[1]) >= int(found[1]):
            return self._store(upload[0], upload[1], query)
        return self._answer(308, Range=f"bytes=0-{len(upload[1]) - 1}")

    def do_DELETE(self) -> None:
        bucket, name, _ = self._target()
        if self.bucket.objects.pop(f"{bucket}/{name}", None) is None:
            return self._answer(404, {"error": {"code": 404}})
        return self._answer(204)
