"""python -m minilora.commands.demo RUN ...: a page on which finished runs are asked about pictures.

    curl --data-binary @dog.jpg "http://127.0.0.1:8000/api/answer?question=what+colour+is+it"

GET / is the page. POST /api/answer takes a picture and, in the query, run, question, choices and
classes; it gives {"run", "answers": [[label, probability], ...], "milliseconds"}, or {"error":
sentence}. POST /answer adds what the page shows. Who may ask, see `check_sender`.
"""

import io
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import make_dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from minilora.data.pictures.images import open_image
from minilora.data.pictures.transforms import build_transform
from minilora.errors import UserError
from minilora.inject import disable_lora
from minilora.report.attention import layer_heats, overlay
from minilora.report.page import STYLE
from minilora.report.samples import data_uri, square, to_picture
from minilora.report.svg import bars_html
from minilora.settings import exit_codes as cli
from minilora.settings.flags import flag, flags_of
from minilora.settings.flags_evaluate import EvalConfig
from minilora.settings.parse import Parser, check_device
from minilora.speed.threads import set_threads
from minilora.tasks.load import load_run
from minilora.tasks.run import Run
from minilora.training.device import choose_device
from reference_models import ModelError

PAGE = Path(__file__).with_suffix(".html").read_text(encoding="utf-8").replace("{{style}}", STYLE)
METHODS = {"/": "GET", "/answer": "POST", "/api/answer": "POST"}
LOCAL = {"localhost", "127.0.0.1", "[::1]"}
# what each kind of run is asked with, besides the picture
TAKES = {"classify": (), "names": ("classes",), "vqa": ("question",), "choice": ("question", "choices")}
SECONDS = 15  # that a sender, or a reader, may pause
MAX_BYTES = 20 * 2**20  # of a picture
MAX_TEXT = 16_000  # characters of all texts together, percent-encoded
OWN = [
    ("host", str, flag("page", "127.0.0.1", "address to listen on", meta="ADDRESS")),
    ("port", int, flag("page", 8000, "port; 0: a free one", int, low=0, high=65535)),
    ("samples", int, flag("page", 6, "pictures of each run's own data to offer", int, low=0, high=64)),
]
DemoConfig = make_dataclass("DemoConfig", OWN + flags_of(EvalConfig, "device", "amp", "threads", "weights"))


class Demo:
    """A run and the one thread that asks it: who comes meanwhile waits. A thread rather than a
    lock, as each thread that computes brings its own pool of OpenMP threads."""

    def __init__(self, name: str, run: Run, samples: int):
        self.name, self.run, self.worker = name, run, ThreadPoolExecutor(1)
        kind = "names" if run.config.head == "names" else run.task
        self.takes = TAKES[kind]
        line = f"{kind}, {run.config.mode}, {run.config.model_name}, {run.amp} on {run.device}"
        pictures = own_samples(run, samples) if samples else []
        self.about = {"name": name, "about": line, "takes": self.takes, "samples": pictures}

    def answer(self, picture: io.BytesIO, texts: dict[str, Any], page: bool) -> dict[str, Any]:
        """What the run says of a picture, for the page also without LoRA, with bars and overlays
        {layer: picture}, {} where a model has no attention. UserError for what it cannot take."""
        if strange := [name for name in texts if name not in self.takes]:
            takes = " and ".join(self.takes) or "a picture alone"
            raise UserError(f"{strange[0]} is not for {self.name}, which takes {takes}")
        image, run = open_image(picture), self.run

        def ask() -> dict[str, Any]:
            started = time.perf_counter()
            (answers,) = run.predict([image], **texts)
            found = {"answers": answers, "milliseconds": round(1000 * (time.perf_counter() - started), 2)}
            if page:
                pixels = build_transform(run.preprocess)(image)[None].to(run.device)
                below = square(to_picture(pixels[0], run.preprocess), 224)
                heats = {name: heat[0].mean(0).cpu().numpy() for name, heat in layer_heats(run.model, pixels).items()}
                found["attention"] = {name: data_uri(overlay(below, heat)) for name, heat in heats.items()}
                found["bars"] = bars_html([(text, p, f"{100 * p:.1f} %") for text, p in answers], top=1.0)
            return found

        found = {"run": self.name, **ask()}
        if page and run.config.mode == "lora":
            with disable_lora(run.model):
                found["base"] = ask()
        return found


def own_samples(run: Run, count: int) -> list[dict[str, Any]]:
    """Pictures of the run's data with what is asked about them; [] where the data are gone."""
    try:
        batch = run.batch(count, EvalConfig())
    except (UserError, OSError) as error:
        print(f"{run.name}: no samples: {cli.printable(str(error))}", file=sys.stderr)
        return []
    asked = [{"title": title} | ({"question": title} if run.task == "vqa" else {}) for title in run.titles(batch)]
    if run.task == "choice":
        asked = [{"title": q.question, "question": q.question, "choices": "\n".join(q.choices)} for q in batch["asked"]]
    images = [data_uri(to_picture(pixels, run.preprocess)) for pixels in run.pictures(batch)]
    return list({image: {"image": image} | texts for image, texts in zip(images, asked, strict=False)}.values())


class Refusal(Exception):
    """(status, sentence) for a request that is not answered."""


class Server(ThreadingHTTPServer):
    """The page and the answers of demos {name: Demo}."""

    request_queue_size = 128

    def __init__(self, host: str, port: int, demos: Mapping[str, Demo]):
        self.demos = demos
        runs = json.dumps([demo.about for demo in demos.values()])
        # no text can end the script
        self.page = PAGE.replace("{{runs}}", runs.replace("<", r"\u003c"))
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        name = f"[{host}]" if ":" in host else host.lower()
        self.url = f"http://{name}:{self.server_address[1]}/"
        self.public = name not in LOCAL
        self.names = {*LOCAL, name, socket.gethostname().lower()}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One line on the terminal, none for a client who has gone; the server goes on."""
        if not isinstance(error := sys.exception(), (ConnectionError, TimeoutError)):
            print(f"error: {cli.printable(f'{type(error).__name__}: {error}')}", file=sys.stderr, flush=True)


class Handler(BaseHTTPRequestHandler):
    """One request; the connection is closed after the answer."""

    protocol_version = "HTTP/1.1"
    timeout = SECONDS
    default_request_version = "HTTP/1.0"  # where the first line names none; it gets a status too

    def finish(self) -> None:
        # the rest of the request: to close before it has come takes the answer from its reader
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.rfile.read(MAX_BYTES)
        super().finish()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        try:
            self.check_sender()
            if METHODS.get(path) != self.command:
                raise Refusal(405 if path in METHODS else 404, "there are GET /, POST /answer and POST /api/answer")
            content = self.server.page if path == "/" else self.answer(query, path == "/answer")
        except Refusal as refusal:
            return self.send_error(*refusal.args)
        except UserError as error:
            return self.send_error(400, str(error).removeprefix("--"))
        except TimeoutError:
            return self.send_error(408, f"nothing came for {SECONDS} seconds; the picture is not whole")
        except Exception:
            self.server.handle_error(self.request, self.client_address)
            return self.send_error(500, "the model could not answer; the terminal of the server says why")
        self.reply(200, content)

    do_POST = do_GET

    def check_sender(self) -> None:
        """Refusal unless it is this page, or a program, that asks this server by its own name, or a
        public one by a number: a stranger can let a name mean our address, but no number."""
        host, origin = (", ".join(self.headers.get_all(name, [])).lower() for name in ("Host", "Origin"))
        name = re.sub(r":\d+$", "", host)
        if name not in self.server.names and not (self.server.public and re.fullmatch(r"[\d.]+|\[[\da-f:.]+\]", name)):
            raise Refusal(403, f"this server is {self.server.url} and answers under that name alone")
        if "Origin" in self.headers and origin != f"http://{host}":
            raise Refusal(403, "a page from elsewhere may not ask this server")

    def answer(self, query: str, page: bool) -> dict[str, Any]:
        if len(query) > MAX_TEXT:
            raise Refusal(413, f"the texts have {len(query):,} characters; at most {MAX_TEXT:,} are read")
        # UTF-8, which http.server takes for Latin-1
        given = parse_qs(query.encode("latin-1").decode(errors="replace"), keep_blank_values=True)
        texts = {name: parts if name in ("choices", "classes") else " ".join(parts) for name, parts in given.items()}
        demos = self.server.demos
        if (name := texts.pop("run", next(iter(demos)))) not in demos:
            raise UserError(f"run is one of {', '.join(demos)}")
        return demos[name].worker.submit(demos[name].answer, self.body(), texts, page).result()

    def body(self) -> io.BytesIO:
        """The picture, as it came."""
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or len(lengths) != 1 or not re.fullmatch("[0-9]{1,18}", lengths[0]):
            raise Refusal(411, "the picture is the body of the request, and needs one Content-Length, a whole number")
        if (length := int(lengths[0])) > MAX_BYTES:
            raise Refusal(413, f"the picture has {length:,} bytes; at most {MAX_BYTES:,} are read: make it smaller")
        if len(body := self.rfile.read(length)) < length:
            raise UserError(f"the picture ends after {len(body):,} of {length:,} bytes")
        return io.BytesIO(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """http.server's own errors too; to it an unknown method is no fault of the client."""
        self.reply({501: 405, 505: 400}.get(code, code), {"error": message or self.responses[code][0]})

    def reply(self, status: int, content: Any) -> None:
        page = isinstance(content, str)
        body = (content if page else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{'text/html' if page else 'application/json'}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline' data: blob:")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def log_message(self, *parts: Any) -> None:
        """Nothing: what people ask is theirs."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(DemoConfig, "python -m minilora.commands.demo", "RUN ... [flags]", __doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories; several answer side by side")
    typed, args = parser.read(argv)
    options, demos = DemoConfig(**typed), {}
    check_device(options.device)
    set_threads(options.threads)
    for path in args.runs:
        run = load_run(path, choose_device(options.device), options.weights)
        run.amp = options.amp or run.amp
        name = run.name + "'" * sum(demo.run.name == run.name for demo in demos.values())
        demos[name] = Demo(name, run, options.samples)
    try:
        server = Server(options.host, options.port, demos)
    except (OSError, UnicodeError) as error:
        where = f"--host {options.host} --port {options.port}"
        raise UserError(f"{where}: cannot listen there ({error}); choose another") from None
    if server.public:
        print(f"warning: --host {options.host} is open to others, and there is no password", file=sys.stderr)
    # at once: a thread that computes would otherwise be waited for
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    print(f"{server.url} answers; Ctrl-C ends it", flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, (UserError, ModelError)))
