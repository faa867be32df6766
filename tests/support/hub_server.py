"""A server on the loopback interface that answers as the hub of hf: downloads does, and misbehaves where it is told."""

import hashlib
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TENSOR = bytes(range(256)) * 1200  # 307,200 bytes: several blocks
HEADER = b'{"w":{"dtype":"U8","shape":[307200],"data_offsets":[0,307200]}}'
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + TENSOR
CONFIG = b'{"model_type": "vit"}'


class Hub(ThreadingHTTPServer):
    """A hub in small: `files` by name; large files are declared and redirected as the real one does."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"config.json": CONFIG, "vocab.txt": b"[PAD]\n", "model.safetensors": WEIGHTS}
        self.large = {"model.safetensors", "a.safetensors", "b.safetensors", "pytorch_model.bin"}
        self.declare: dict[str, dict] = {}  # name -> headers that override the true ones
        self.break_after: dict[str, list[int]] = {}  # name -> bytes to send before closing, request by request
        self.send: dict[str, bytes] = {}  # name -> bytes sent in place of the true ones
        self.endless: dict[str, tuple[bytes, float]] = {}  # name -> bytes sent again and again, seconds between them
        self.status: dict[str, list[int]] = {}  # name -> answers before the real one
        self.ranges = True
        self.token: str | None = None
        self.redirect_to: str | None = None  # another server's address for the large files
        self.seen: list[tuple[str, dict]] = []  # (path, request headers)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def requests(self, name: str) -> list[dict]:
        return [headers for path, headers in self.seen if path.endswith(f"/{name}") and "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, code: int, headers: dict | None = None, body: bytes = b"") -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": len(body)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        hub, name = self.server, self.path.rpartition("/")[2]
        if inside := re.search(r"/resolve/[^/]+/(.+)$", self.path):  # 1_Pooling/config.json is another file
            name = inside[1]
        hub.seen.append((self.path, dict(self.headers)))
        if name in hub.endless:
            return self.without_end(hub.endless[name])
        if hub.status.get(name):
            return self.answer(hub.status[name].pop(0))
        if self.path.startswith("/old/"):  # a renamed model
            return self.answer(307, {"Location": self.path.replace("/old/", "/org/")})
        if hub.token and "/resolve/" in self.path and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer(401, {"X-Error-Message": "Invalid credentials"})
        body = hub.files.get(name)
        if body is None:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        digest = hashlib.sha256(body) if name in hub.large else hashlib.sha1(b"blob %d\0" % len(body) + body)
        headers = {"ETag": f'"{digest.hexdigest()}"', "X-Repo-Commit": COMMIT}
        if name in hub.large and "/resolve/" in self.path:
            headers = {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": len(body), "X-Repo-Commit": COMMIT}
            place = f"{hub.redirect_to or hub.url}/blobs/{name}"
            return self.answer(302, headers | {"Location": place} | hub.declare.get(name, {}))
        self.content(name, hub.send.get(name, body), {} if "/blobs/" in self.path else headers)

    def without_end(self, endless: tuple[bytes, float]) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(endless[0])
                time.sleep(endless[1])
        except OSError:
            self.close_connection = True

    def content(self, name: str, body: bytes, headers: dict) -> None:
        hub, start = self.server, 0
        if hub.ranges and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                return self.answer(416)
            headers = headers | {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        part = body[start:]
        self.send_response(206 if start else 200)
        for key, value in (headers | {"Content-Length": len(part)} | hub.declare.get(name, {})).items():
            self.send_header(key, str(value))
        self.end_headers()
        stop = hub.break_after.get(name)
        self.wfile.write(part[: stop.pop(0)] if stop else part)
        self.close_connection = True
