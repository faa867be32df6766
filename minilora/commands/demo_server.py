"""The server below commands/demo: three addresses, no file of the machine, strangers kept out.

    GET /              the page
    GET /api/runs      [{"name", "about", "takes", "lora", "samples"}, ...]
    POST /api/answer   body: a picture; query: run, question, choices, classes, base=1, attention=1
                       {"run", "answers": [[label, probability], ...], "milliseconds", "base"}

An error is {"error": sentence}. A page from elsewhere may not ask (Origin), nor one that has given
its own name the address of this machine (Host).
"""

import io
import ipaddress
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

from minilora.commands.demo_page import PAGE
from minilora.data.pictures.images import BadImage
from minilora.errors import UserError
from minilora.settings.exit_codes import printable

METHODS = {"/": "GET", "/api/runs": "GET", "/api/answer": "POST"}
SLOTS = 64  # requests at once; more of them wait to be accepted
SECONDS = 15  # for a request to arrive, and for its answer to be taken
MAX_BYTES = 20 * 2**20  # of a picture
MAX_TEXT = 4000  # characters of all texts together
HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Connection": "close",
}


class Refusal(Exception):
    """(status, sentence) for a request that is not answered."""


class InTime(io.RawIOBase):
    """What a connection sends within `seconds`, however slowly: later reads time out."""

    def __init__(self, connection: socket.socket, seconds: float):
        self.connection, self.end = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        self.connection.settimeout(max(self.end - time.monotonic(), 1e-3))
        return self.connection.recv_into(buffer)


class Server(ThreadingHTTPServer):
    """A thread for each request, SLOTS at most. demos: {name: Demo}."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, host: str, port: int, demos: Mapping[str, Any]):
        self.demos, self.slots = demos, threading.Semaphore(SLOTS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        self.public = not ipaddress.ip_address(self.server_address[0]).is_loopback
        self.names = {"localhost", "127.0.0.1", "::1", host.lower(), socket.gethostname().lower()}
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        self.slots.acquire()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One line on the terminal, none for a client who has gone; the server goes on."""
        if not isinstance(error := sys.exception(), OSError):
            print(f"error: {printable(f'{type(error).__name__}: {error}')}", file=sys.stderr, flush=True)


class Handler(BaseHTTPRequestHandler):
    """One request; the connection is closed after the answer."""

    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # where the first line names none; it gets a status too
    refused = False

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(InTime(self.connection, SECONDS))

    def finish(self) -> None:
        """The rest of a refused request is read for two seconds: to close before it has come would
        take the sentence away from its reader."""
        super().finish()
        rest = InTime(self.connection, 2)
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.refused and time.monotonic() < rest.end and rest.read(2**16):
                pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        try:
            self.check_sender()
            if path not in METHODS:
                raise Refusal(404, f"no such address; there are {', '.join(METHODS)}")
            if self.command != METHODS[path]:
                raise Refusal(405, f"{path} is asked with {METHODS[path]}")
            runs = [demo.about for demo in self.server.demos.values()]
            self.reply(200, PAGE if path == "/" else runs if path == "/api/runs" else self.answer())
        except Refusal as refusal:
            self.send_error(*refusal.args)
        except BadImage as error:
            self.send_error(415, f"the picture {error.reason}")
        except UserError as error:
            self.send_error(400, str(error).removeprefix("--"))
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            self.server.handle_error(self.request, self.client_address)
            self.send_error(500, "the model could not answer; the terminal of the server says why")

    do_POST = do_GET

    def check_sender(self) -> None:
        """Refusal unless it is this page, or a program, that asks this server by its own name, or a
        public one by a number: a stranger can let a name mean our address, but no number."""
        hosts, origins = ([text.lower() for text in self.headers.get_all(name, [])] for name in ("Host", "Origin"))
        found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^\[\]:]+)(:\d+)?", hosts[0]) if len(hosts) == 1 else None
        name = found[1].strip("[]") if found else ""
        number = re.fullmatch(r"[\d.]+|[\da-f:.]*:[\da-f:.]*", name)
        if name not in self.server.names and not (number and self.server.public):
            raise Refusal(403, f"this server is {self.server.url} and answers under that name alone")
        if origins and origins != [f"http://{hosts[0]}"]:
            raise Refusal(403, "a page from elsewhere may not ask this server")

    def answer(self) -> dict[str, Any]:
        demos = self.server.demos
        try:  # UTF-8, which http.server hands on as Latin-1
            asked = self.path.partition("?")[2].encode("latin-1").decode()
            query = parse_qs(asked, keep_blank_values=True, errors="strict", max_num_fields=MAX_TEXT)
        except ValueError:
            raise Refusal(400, "the query cannot be read; it is name=text&name=text in percent-encoded UTF-8") from None
        known = {"run": list(demos), "base": ["0", "1"], "attention": ["0", "1"]}
        for key, values in known.items():
            if len(query.setdefault(key, values[:1])) > 1 or query[key][0] not in values:
                raise Refusal(400, f"{key} is given once, and is one of {', '.join(values)}")
        (name,), (base,), (attention,) = map(query.pop, known)
        if (size := sum(len(text) for texts in query.values() for text in texts)) > MAX_TEXT:
            raise Refusal(413, f"the texts have {size:,} characters; at most {MAX_TEXT:,} are read")
        demo, texts = demos[name], demos[name].texts(query)
        return demo.worker.submit(demo.answer, self.body(), texts, base == "1", attention == "1").result()

    def body(self) -> io.BytesIO:
        """The picture, as it came."""
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or not lengths:
            raise Refusal(411, "the picture is the body of the request, and needs a Content-Length")
        if len(lengths) > 1 or not re.fullmatch("[0-9]{1,18}", lengths[0]):
            raise Refusal(400, "Content-Length must be one whole number")
        if (length := int(lengths[0])) > MAX_BYTES:
            raise Refusal(413, f"the picture has {length:,} bytes; at most {MAX_BYTES:,} are read: make it smaller")
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            raise Refusal(408, f"the picture did not come within {SECONDS} seconds") from None
        if len(body) < length or not body:
            raise Refusal(400, f"the picture ends after {len(body)} bytes")
        return io.BytesIO(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Also what http.server refuses, with a method or version that it does not know
        as the client's fault."""
        self.refused = True
        self.reply({501: 405, 505: 400}.get(code, code), {"error": message or self.responses[code][0]})

    def reply(self, status: int, content: Any) -> None:
        page = isinstance(content, str)
        body = (content if page else json.dumps(content, allow_nan=False)).encode()
        kind = f"{'text/html' if page else 'application/json'}; charset=utf-8"
        self.connection.settimeout(SECONDS)
        self.send_response(status)
        for name, value in (HEADERS | {"Content-Type": kind, "Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def log_message(self, *parts: Any) -> None:
        """Nothing: what people ask is theirs."""
