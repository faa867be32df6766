"""python -m minilora.commands.demo RUN ...: a page on which finished runs are asked about pictures.

Programs ask the same of /api/answer: the picture is the body, everything else the query.

    curl --data-binary @dog.jpg "http://127.0.0.1:8000/api/answer?question=what+colour+is+it"
"""

import copy
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import field, fields, make_dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from minilora.commands.demo_server import Server
from minilora.data.pictures.images import open_image
from minilora.data.pictures.transforms import build_transform
from minilora.errors import UserError
from minilora.inject import disable_lora, lora_layers
from minilora.report.attention import layer_heats, overlay
from minilora.report.samples import data_uri, square, to_picture
from minilora.settings import exit_codes as cli
from minilora.settings.flags import flag
from minilora.settings.flags_evaluate import EvalConfig
from minilora.settings.parse import Parser, check_device
from minilora.speed.threads import set_threads
from minilora.tasks.choice.run import by_picture
from minilora.tasks.load import load_run
from minilora.tasks.run import Run
from minilora.training.device import autocast, choose_device
from reference_models import ModelError

# what each kind of run is asked with, besides the picture
TAKES = {"classify": (), "names": ("classes",), "vqa": ("question",), "choice": ("question", "choices")}
SIDE = 224  # of an attention overlay in pixels
USED = ("device", "amp", "threads", "weights")  # the flags of evaluate.py that a page needs too
SHARED = [(f.name, f.type, field(default=f.default, metadata=f.metadata)) for f in fields(EvalConfig) if f.name in USED]
OWN = [
    ("host", str, flag("page", "127.0.0.1", "address to listen on", meta="ADDRESS")),
    ("port", int, flag("page", 8000, "port; 0: a free one", int, low=0, high=65535)),
    ("samples", int, flag("page", 6, "pictures of each run's own data to offer", int, low=0, high=64)),
]
DemoConfig = make_dataclass("DemoConfig", OWN + SHARED)


class Demo:
    """A run and the one thread that asks it: who comes meanwhile waits. A thread rather than a
    lock, as each thread that computes brings its own pool of OpenMP threads."""

    def __init__(self, name: str, run: Run, samples: int):
        self.name, self.run, self.worker = name, run, ThreadPoolExecutor(1)
        self.kind = "names" if run.config.head == "names" else run.task
        self.takes, self.lora = TAKES[self.kind], any(True for _ in lora_layers(run.model))
        names = run.config.model.values() if isinstance(run.config.model, dict) else [run.config.model]
        model = " + ".join(Path(name).name for name in names)  # not where it lies
        line = f"{self.kind}, {run.config.mode}, {model}, {run.amp} on {run.device}"
        known = {"takes": self.takes, "lora": self.lora, "samples": own_samples(run, samples) if samples else []}
        self.about = {"name": name, "about": line} | known

    def texts(self, query: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """A query as `predict` takes it; UserError for what this run cannot be asked, or needs."""
        if strange := [name for name in query if name not in self.takes]:
            allowed = " and ".join(self.takes) or "a picture alone"
            raise UserError(f"{strange[0]} is not for {self.name}, a run of the kind {self.kind}: it takes {allowed}")
        if missing := [name for name in self.takes if name != "classes" and not "".join(query.get(name, "")).strip()]:
            raise UserError(f"{missing[0]} is missing; {self.name} cannot answer without")
        if len(query.get("question", "")) > 1:
            raise UserError("question is given more than once; ask one")
        return {name: texts[0] if name == "question" else texts for name, texts in query.items()}

    def answer(self, picture: BytesIO, texts: dict[str, Any], base: bool, attention: bool) -> dict[str, Any]:
        """What the run says of a picture and, with `base`, what it says without its LoRA; UserError
        for a picture or a text that it cannot take."""
        if base and not self.lora:
            raise UserError(f"base: {self.name} has no LoRA to switch off; leave base out")
        image, run = open_image(picture), self.run
        if "classes" in texts:
            run = copy.copy(run)
            run.name_classes(texts.pop("classes"))

        def ask() -> dict[str, Any]:
            started = time.perf_counter()
            (answers,) = run.predict([image], **texts)
            part = {"answers": answers, "milliseconds": round(1000 * (time.perf_counter() - started), 2)}
            return part | ({"attention": overlays(run, image)} if attention else {})

        found = {"run": self.name, **ask()}
        if base:
            with disable_lora(run.model):
                found["base"] = ask()
        return found


def overlays(run: Run, image: Image.Image) -> dict[str, str]:
    """{layer: the picture below its attention, as a data: URI}, {} where the model has none."""
    pixels = build_transform(run.preprocess)(image)[None].to(run.device)
    with torch.inference_mode(), autocast(run.device, run.amp):
        heats = layer_heats(run.model, pixels)
    below = square(to_picture(pixels[0], run.preprocess), SIDE)
    return {name: data_uri(overlay(below, heat[0].mean(0).cpu().numpy())) for name, heat in heats.items()}


def own_samples(run: Run, count: int) -> list[dict[str, Any]]:
    """Pictures of the run's data with what is asked about them; [] where the data are gone."""
    try:
        batch = run.batch(count, EvalConfig())
        asked = [{"title": title} | ({"question": title} if run.task == "vqa" else {}) for title in run.titles(batch)]
        if run.task == "choice":
            _, split, _ = run.split(EvalConfig())
            asked = [split[i]._asdict() | {"title": split[i].question} for i in by_picture(split, count)]
    except (UserError, OSError) as error:
        print(f"{run.name}: no samples: {cli.printable(str(error))}", file=sys.stderr)
        return []
    images = [data_uri(to_picture(pixels, run.preprocess)) for pixels in run.pictures(batch)]
    return list({image: {"image": image} | texts for image, texts in zip(images, asked, strict=False)}.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(DemoConfig, "python -m minilora.commands.demo", "RUN ... [flags]", __doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run directories; several answer side by side")
    typed, args = parser.read(argv)
    options, demos = DemoConfig(**typed), {}
    check_device(options.device)
    if not args.runs:
        raise UserError("name a run directory: python -m minilora.commands.demo RUN")
    if twice := [path for i, path in enumerate(args.runs) if path in args.runs[:i]]:
        raise UserError(f"{twice[0]} is named twice; name different runs")
    set_threads(options.threads)
    device = choose_device(options.device)
    for path in args.runs:
        run = load_run(path, device, options.weights)
        run.amp = options.amp or run.amp
        name = run.name if run.name not in demos else f"{run.name}-{len(demos) + 1}"
        demos[name] = Demo(name, run, options.samples)
    return serve(options.host, options.port, demos)


def serve(host: str, port: int, demos: Mapping[str, Demo]) -> int:
    """Answer until SIGINT or SIGTERM ends the process."""
    try:
        server = Server(host, port, demos)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: cannot listen there ({reason}); choose another") from None
    if server.public:
        print(f"warning: --host {host}: whoever reaches this machine can ask; there is no password", file=sys.stderr)
    # at once: a thread that computes would otherwise be waited for
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    print(f"{server.url} answers; Ctrl-C ends it", flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, (UserError, ModelError)))
