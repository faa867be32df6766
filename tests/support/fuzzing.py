"""Damage for files: bytes that were flipped, cut or doubled, and values that nobody expects, all from a seed.

`Watch` runs a reader on damaged files and holds the promise: the answer or one line of a known error, in seconds, with
a bounded memory, and no file written outside the folder that was given.
"""

import contextlib
import io
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path

from minilora.errors import RunError, UserError
from minilora.settings.exit_codes import printable
from reference_models import ModelError

KNOWN = (UserError, ModelError, RunError)
SECONDS = 60  # per case, on a crowded machine
CPU_SECONDS = 5  # that a case may take
MEMORY = 3 << 30  # address space that a reader may take beside what the process has

STRANGE = (
    *(None, True, False, 0, -1, 1, 2, 7, 1.5, -0.0, 1e300, 2**31, 2**63, 10**30, float("nan"), float("inf")),
    *("", " ", "\0", "a\nb", "../../etc/passwd", "/etc/passwd", "C:\\x", "\u202e", "<script>", "x" * 5000),
    *("{0.__class__}", "__import__('os').system('true')", "%s%n", "none", "nan", "-1", "hf:../..", "é\U0001f600"),
    *([], {}, [[]], [None], [1, 2], [-1], ["a"], {"": 0}, {"a": {}}, [1] * 3000, "((((((a*)*)*)*)*)*)b", "(", "[z-a]"),
)


# names that a file system takes; bytes, since not all of them are UTF-8
NAMES = (b"cat", b"a b", b"=1+1", b"-x", b"$x$", b"_x", b"caf\xe9", b"\xff\xfe", b"\x1b[2J\x1b]0;x\x07", b"a\nb")
NAMES += (b"a\rb", b"<b>&amp;", b"a|b", b"'q'", b"{0}", b"%s", b".x", b"val", b"x" * 200)
NAMES += tuple(name.encode() for name in ("a\u202eb", "e\u0301", "\u2028", "\U0001f600"))


def deep(levels: int = 5000) -> str:
    """Json that is nested deeper than any reader recurses."""
    return "[" * levels + "]" * levels


def places(value, path=()):
    """Paths of every value inside a json value, the outermost first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from places(one, (*path, key))


def strange_value(rng: random.Random, value):
    """A copy of a json value in which something was replaced, taken away, doubled or renamed."""
    value = json.loads(json.dumps(value))
    path = rng.choice(list(places(value)))
    if not path:
        return rng.choice(STRANGE)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    key, kind = path[-1], rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), rng.choice(STRANGE))
    elif kind == 1:
        holder[str(rng.choice(STRANGE))[:40]] = holder.pop(key)
    elif kind == 2 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        holder[key] = holder[key] * rng.choice((-1, 0, 2, 1000, 10**12)) + rng.choice((0, 1, 0.5))
    else:
        holder[key] = rng.choice(STRANGE)
    return value


def strange_bytes(rng: random.Random, data: bytes) -> bytes:
    """A copy of `data` with a few flipped bits, a cut, a piece doubled or taken out, or bytes from elsewhere."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        b = min(b, a + rng.choice((1, 4, 30, len(data))))
        kind = rng.randrange(6)
        if kind == 0 and data:
            place = rng.randrange(len(data))
            data = data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        elif kind == 1:
            data = data[:a]
        elif kind == 2:
            data = data[:b] + data[a:b] + data[b:]
        elif kind == 3:
            data = data[:a] + data[b:]
        elif kind == 4:
            data = data[:a] + rng.randbytes(rng.choice((1, 3, 20))) + data[b:]
        else:
            odd = (
                b"\xef\xbb\xbf",
                b"\xff\xfe",
                b"\0",
                b'"',
                b"{",
                b"]",
                b",",
                b"\r",
                b"#",
                b"9" * 400,
                b"\n\n",
                b"e999",
            )
            data = data[:a] + rng.choice(odd) + data[b:]
    return data


def strange_json(rng: random.Random, data: bytes) -> bytes:
    """Damaged json text: half of it in its values, half of it in its bytes."""
    kind = rng.randrange(20)
    if kind == 0:
        return deep().encode()
    if kind == 1:  # every key of an object twice, the second time with another value
        value = json.loads(data)
        twice = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()] if isinstance(value, dict) else []
        twice += [f"{json.dumps(k)}: {json.dumps(rng.choice(STRANGE))}" for k in value] if twice else []
        return ("{" + ", ".join(twice) + "}").encode()
    if kind < 13:
        value = json.loads(data)
        for _ in range(rng.choice((1, 1, 2, 4))):
            value = strange_value(rng, value)
        return json.dumps(value, ensure_ascii=bool(rng.randrange(2))).encode("utf-8", "surrogatepass")
    return strange_bytes(rng, data)


def strange_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with a damaged header: its length, its json or single entries; the tensors stay."""
    size = struct.unpack("<Q", data[:8])[0]
    text, tensors = data[8 : 8 + size], data[8 + size :]
    kind = rng.randrange(10)
    if kind == 0:
        length = rng.choice((0, 1, size - 1, size + 1, 2**27, 2**31, 2**63, 2**64 - 1, rng.randrange(2 * size)))
        return struct.pack("<Q", length) + text + tensors
    if kind == 1:
        return strange_bytes(rng, data[: 8 + size]) + tensors
    header = json.loads(text)
    if kind < 7:
        header = strange_entry(rng, header)
        text = json.dumps(header).encode()
    elif kind == 7:  # two entries of one name
        name = rng.choice(list(header))
        text = text.rstrip()[:-1] + b", " + json.dumps(name).encode() + b": " + json.dumps(
            rng.choice([header[name], *STRANGE])).encode() + b"}"  # fmt: skip
    else:
        text = strange_json(rng, text)
    return struct.pack("<Q", len(text)) + text + tensors


def strange_entry(rng: random.Random, header: dict) -> dict:
    """One tensor of a safetensors header with another type, shape, place or name."""
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry, kind = header[name], rng.randrange(6)
    if kind == 0:
        entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "U64", "X", "", None, 3))
    elif kind == 1:
        entry["shape"] = rng.choice(([], [0], [-1], [2**62, 4], entry["shape"][::-1], [*entry["shape"], 1], None, "3"))
    elif kind == 2:
        start, end = entry["data_offsets"]
        pairs = ((end, start), (start, end + 4), (-4, end), (0, 2**63), (start + 1, end), (0, 0), (start,), None)
        entry["data_offsets"] = rng.choice(pairs)
    elif kind == 3:
        other = rng.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    elif kind == 4:
        header[rng.choice(("", "x", "../x", name + ".weight", "a" * 3000, "\0"))] = header.pop(name)
    else:
        header["__metadata__"] = rng.choice(({"a": 1}, {"a": None}, [], 3, {"format": "tf"}, {}))
    return header


def strange_place(rng: random.Random, path: Path) -> None:
    """Something else where a file is expected: a pipe, a folder, a link to nowhere, itself or a device, nothing, or a
    file of a terabyte without a byte on the disk."""
    path.unlink()
    kinds = ("pipe", "folder", "loop", "nowhere", "zero", "none", "empty", "endless")
    # weights and checkpoints may be as long as a disk holds
    kind = rng.choice(kinds[:-1] if path.suffix == ".safetensors" or path.name == "state.json" else kinds)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("loop", "nowhere", "zero"):
        path.symlink_to({"loop": path.name, "nowhere": "gone", "zero": "/dev/zero"}[kind])
    elif kind != "none":
        with open(path, "wb") as file:
            file.truncate(1 << 40 if kind == "endless" else 0)


def png_chunks(data: bytes) -> list[bytes]:
    """A PNG's chunks, whole."""
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big") + 12
        chunks.append(data[at : at + size])
        at += size
    return chunks


def strange_metadata(rng: random.Random, data: bytes) -> bytes:
    """A PNG with damaged, long or unknown chunks before its pixels, which stay as they are."""
    first, *rest = png_chunks(data)
    extra = b""
    for _ in range(rng.choice((1, 1, 2, 80))):
        name = rng.choice(
            (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"gAMA", b"cHRM", b"pHYs", b"sRGB", b"tIME", b"prVt", b"eXIf")
        )
        body = rng.choice((b"", b"x", b"k\0\0" + zlib.compress(b"x" * rng.choice((9, 2_000_000))), rng.randbytes(40)))
        check = zlib.crc32(name + body) ^ rng.choice((0, 0, 1))
        extra += struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)
    return data[:8] + first + extra + b"".join(rest)


def strange_picture(rng: random.Random, image) -> tuple[str, bytes]:
    """(extension, content): a picture in one of many formats, damaged in its bytes; or a header without an end."""
    if rng.randrange(12) == 0:
        head = rng.choice((b"P6 #", b"P5\n#", b"GIF89a\1\0\1\0\0\0\0!\xfe", b"BM", b"II*\0", b"\xff\xd8\xff\xfe"))
        return rng.choice((".jpg", ".png", ".ppm", ".gif")), head + rng.choice((b"x", b"\xff" + b"y" * 255)) * 40_000
    extension, modes = rng.choice(
        ((".png", ("RGB", "P", "LA", "I;16")), (".jpg", ("RGB", "CMYK")), (".gif", ("P",)), (".bmp", ("RGB",)))
        + ((".tif", ("RGB", "I;16", "F")), (".webp", ("RGBA",)), (".ppm", ("RGB",)))
    )
    mode = rng.choice(modes)
    buffer = io.BytesIO()
    made = image.convert("L").convert(mode) if mode in ("I;16", "F") else image.convert(mode)
    made.save(buffer, {".jpg": "JPEG", ".tif": "TIFF"}.get(extension, extension[1:].upper()))
    return extension, strange_bytes(rng, buffer.getvalue())


_writing: list = []  # where files may be written while a Watch is open


def _audit(event, args):
    if not _writing or event not in ("open", "os.rename", "os.mkdir", "os.symlink", "os.truncate"):
        return
    if event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wax+")):
        return
    path = args[0] if not isinstance(args[0], bytes) else os.fsdecode(args[0])
    if isinstance(path, (str, os.PathLike)) and str(path) != os.devnull:
        real = os.path.realpath(path)
        if event == "os.mkdir" and os.path.dirname(real) == os.path.realpath(tempfile.gettempdir()):
            return  # torch.load's own, empty and removed again
        if not any(real.startswith(str(root)) for root in _writing[0]):
            _writing[1].append(f"{event} {path}")


sys.addaudithook(_audit)


class Watch:
    """Runs readers on damaged files; `found` lists what broke the promise, `accepted` and `refused` count the rest."""

    def __init__(self, *roots: Path):
        self.roots = tuple(os.path.realpath(root) for root in roots)
        self.found: list[str] = []
        self.accepted = self.refused = 0

    def tries(self, label: str, function, *arguments) -> None:
        written: list[str] = []
        _writing[:] = [self.roots, written]
        started = time.process_time()
        try:
            with limits(SECONDS, MEMORY), open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
                function(*arguments)
            self.accepted += 1
        except KNOWN as error:
            self.refused += 1
            told = printable(str(error))  # as cli.py shows it
            if not 10 < len(told) < 25_000:
                self.found.append(f"{label}: a message of {len(told)} letters: {told[:300]!r}")
        except Exception as error:
            trace = error.__traceback__
            while trace.tb_next and "site-packages" not in trace.tb_next.tb_frame.f_code.co_filename:
                trace = trace.tb_next
            place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
            self.found.append(f"{label}: {type(error).__name__} at {place}: {str(error)[:200]}")
        finally:
            _writing.clear()
        if (took := time.process_time() - started) > CPU_SECONDS:
            self.found.append(f"{label}: took {took:.1f} s")
        self.found += [f"{label}: wrote outside: {what}" for what in written]

    def report(self) -> str:
        return "\n".join(self.found[:30])


@contextlib.contextmanager
def limits(seconds: int, memory: int):
    """TimeoutError after `seconds`, MemoryError where more than `memory` bytes are asked for."""

    def late(signum, frame):
        raise TimeoutError(f"still at work after {seconds} s")

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
