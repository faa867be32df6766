"""One file over HTTP: resumed where it broke off, checked against what the server declared,
renamed when whole.

torch.hub.download_url_to_file, the nearest thing in our dependencies, starts over after every
break, sends no access token and follows redirects with all headers, so this is urllib's opener with
those three things put right.
"""

import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from reference_models.errors import ModelError

BLOCK = 1 << 16
TRIES = 5  # attempts in a row that bring no new byte
WAIT = 0.5  # seconds before the first retry; doubles
TIMEOUT = 30.0
SLOW = 256  # bytes per second, over twice TIMEOUT, below which a transfer counts as broken
PAGE = re.compile(rb"\s*<(!doctype\s+html|!--|html|head)", re.IGNORECASE)
AGENT = "minilora"


class NotFound(ModelError):
    """The server has no such file (404)."""


class _Broken(Exception):
    """The network's fault: worth another attempt."""


class _Wrong(Exception):
    """All bytes are there, but they are not the ones declared."""


@dataclass(frozen=True)
class Declared:
    """What the server says of a file."""

    size: int | None
    digest: str | None  # 64 hex digits are a sha256, 40 the sha1 of a git blob
    tag: str  # names the content in the part file, so that only the same content is resumed
    commit: str | None


def download(url: str, target: Path, token: str | None = None, limit: int | None = None) -> Declared:
    """Fetch `url` into `target`, resuming what an earlier call left unfinished.

    The declared size and digest are the hub's X-Linked-Size and X-Linked-ETag (large files), else
    ETag and Content-Length. `token` goes to the host of `url` alone, never to one that it redirects
    to. limit: most bytes that the file may have. Raises NotFound; ModelError for a refusal, a web
    page in the file's place, wrong bytes (twice), no progress in TRIES attempts, or a full disk.
    """
    target = Path(target)
    failures = wrong = 0
    while True:
        before = _part_size(target)
        try:
            declared, part = _attempt(url, target, token, limit)
            _verify(part, declared)
            break
        except _Broken as error:
            failures = 0 if _part_size(target) > before else failures + 1
            if failures >= TRIES:
                kept = f"; the {_part_size(target)} bytes so far are kept, run again to go on" * bool(before)
                raise ModelError(f"{shown(url)}: download failed {failures} times ({error}){kept}") from None
            time.sleep(WAIT * 2**failures * (failures > 0))
        except _Wrong as error:
            _drop_parts(target)
            wrong += 1
            if wrong == 2:  # the first time a bad resume may be to blame
                raise ModelError(f"{shown(url)}: {error}; nothing was kept, the server's copy is damaged") from None
    os.replace(part, target)
    _drop_parts(target)
    return declared


def _attempt(url: str, target: Path, token: str | None, limit: int | None) -> tuple[Declared, Path]:
    old = next(iter(_parts(target)), None)
    start = old.stat().st_size if old else 0
    response, declared = _open(url, token, start)
    with response:
        part = target.with_name(f".{target.name}.{declared.tag}.part")
        resumed = response.status == 206
        if old and (part != old or not resumed):  # other content, or a server that cannot resume
            _drop_parts(target)
            if resumed:
                return _attempt(url, target, token, limit)
            start = 0
        if resumed and not (response.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
            _drop_parts(target)
            raise _Wrong("the server sent another range of the file than asked for")
        limit = limit or start + shutil.disk_usage(target.parent).free * 9 // 10
        _receive(response, part, start, declared, limit)
    with open(part, "rb") as file:
        if PAGE.match(file.read(4096)) or "html" in response.headers.get_content_type():
            _drop_parts(target)
            page = "a web page, not the file; is it the login page of this network, or a proxy's?"
            raise ModelError(f"{shown(url)}: the answer is {page}")
    if declared.size is not None and part.stat().st_size < declared.size:
        raise _Broken(f"broke off after {part.stat().st_size} of {declared.size} bytes")
    return declared, part


def _receive(response, part: Path, start: int, declared: Declared, limit: int) -> None:
    """Append (or begin) the part file; what arrived before a break stays."""
    received, began = start, time.monotonic()
    try:
        with open(part, "ab" if start else "wb") as file:
            while block := _read(response):
                received += len(block)
                if declared.size is not None and received > declared.size:
                    raise _Wrong(f"wrong size: more than the {declared.size} bytes declared")
                if received > limit:
                    part.unlink(missing_ok=True)
                    reason = "no such file is that long, or no disk here"
                    raise ModelError(f"{part.name}: more than {limit:,} bytes; {reason}")
                passed = time.monotonic() - began
                if passed > 2 * TIMEOUT and received - start < SLOW * passed:
                    came = f"only {received - start} bytes came in {passed:.0f} seconds"
                    raise ModelError(f"{part.name}: given up, {came}")
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ModelError(f"{part}: cannot be written ({error.strerror})") from None


def _read(response) -> bytes:
    try:
        return response.read1(BLOCK)  # read() would wait for a whole block
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(str(error) or type(error).__name__) from None


def _verify(part: Path, declared: Declared) -> None:
    size = part.stat().st_size
    if declared.size is not None and size != declared.size:
        raise _Wrong(f"wrong size: {size} bytes, {declared.size} declared")
    if declared.digest is None:
        return
    name, digest = ("sha256", hashlib.sha256()) if len(declared.digest) == 64 else ("git sha1", hashlib.sha1())
    if name == "git sha1":
        digest.update(f"blob {size}\0".encode())
    with open(part, "rb") as file:
        hashlib.file_digest(file, lambda: digest)
    if digest.hexdigest() != declared.digest:
        raise _Wrong(f"wrong bytes: {name} {digest.hexdigest()}, declared {declared.digest}")


# ---- part files
def _parts(target: Path) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[\w-]+\.part")
    return [path for path in sorted(target.parent.iterdir()) if pattern.fullmatch(path.name)]


def _part_size(target: Path) -> int:
    return max((path.stat().st_size for path in _parts(target)), default=0)


def _drop_parts(target: Path) -> None:
    for path in _parts(target):
        path.unlink(missing_ok=True)


# ---- HTTP
def shown(url: str) -> str:
    """An address for messages: without its password, and its query, which may be a signature."""
    return re.sub("//[^/]*@", "//", url.partition("?")[0])


def _origin(url: str) -> tuple[str, str | None, int | None]:
    split = urllib.parse.urlsplit(url)
    return split.scheme, split.hostname, split.port or {"http": 80, "https": 443}.get(split.scheme)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps what the first host declares on the way, and keeps the token from every other host."""

    def __init__(self, url: str):
        self.home = _origin(url)
        self.declared: dict[str, str] = {}

    def note(self, url: str, headers) -> None:
        if _origin(url) == self.home:
            for name in ("X-Linked-Size", "X-Linked-ETag", "X-Repo-Commit", "X-Error-Code"):
                if headers.get(name):
                    self.declared.setdefault(name, headers[name])

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        scheme = _origin(newurl)[0]
        if scheme not in ("http", "https") or (self.home[0] == "https" and scheme != "https"):
            raise ModelError(f"{shown(req.full_url)}: redirects to {scheme}:, which is not followed")
        self.note(req.full_url, headers)
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and _origin(newurl) == self.home and "Authorization" in req.unredirected_hdrs:
            new.add_unredirected_header("Authorization", req.unredirected_hdrs["Authorization"])
        return new


def _open(url: str, token: str | None, start: int):
    """The response to a GET from byte `start`, and what was declared."""
    try:
        request = urllib.request.Request(url, headers={"User-Agent": AGENT, "Accept-Encoding": "identity"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        if token:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        redirects = _Redirects(url)
        response = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(url, error, token, start) from None
    except urllib.error.URLError as error:
        raise _Broken(str(error.reason)) from None
    except ModelError:
        raise
    except (ValueError, http.client.InvalidURL):  # whose text holds the address, or the token
        raise ModelError(f"{shown(url)}: it, or where it leads, is no address; or HF_TOKEN is no token") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(str(error) or type(error).__name__) from None
    if response.status not in (200, 206):
        with response:
            raise ModelError(f"{shown(url)}: the server answered {response.status} {response.reason}, and sent no file")
    redirects.note(response.url, response.headers)
    at_home = _origin(response.url) == redirects.home
    return response, _declared(redirects.declared, response, at_home)


def _declared(noted: dict[str, str], response, at_home: bool) -> Declared:
    """A foreign host's own ETag means nothing to us; its length does, unless the hub gave one."""
    etag = noted.get("X-Linked-ETag") or (response.headers.get("ETag") if at_home else None) or ""
    etag = etag.removeprefix("W/").strip('"')
    digest = etag.lower() if re.fullmatch(r"[0-9a-fA-F]{64}|[0-9a-fA-F]{40}", etag) else None
    total = noted.get("X-Linked-Size") or (response.headers.get("Content-Range") or "").rpartition("/")[2]
    if not total and response.status == 200:
        total = response.headers.get("Content-Length") or ""
    size = int(total) if re.fullmatch(r"\d{1,15}", total) else None
    tag = re.sub(r"[^\w-]", "_", etag)[:64] or f"size-{size}"
    return Declared(size, digest, tag, noted.get("X-Repo-Commit"))


def _refusal(url: str, error: urllib.error.HTTPError, token: str | None, start: int) -> Exception:
    url, code = shown(url), error.code
    reason = " ".join(str(error.headers.get("X-Error-Message") or error.reason).split())
    if code == 404:
        return NotFound(f"{url}: not found ({error.headers.get('X-Error-Code') or reason})")
    if code in (401, 403):
        hint = "HF_TOKEN was sent, but may not read it" if token else "set HF_TOKEN if it is private or gated"
        return ModelError(f"{url}: access refused ({code} {reason}); check the name; {hint}")
    if code == 416 and start:
        return _Wrong(f"the server has fewer than the {start} bytes that were kept")
    if code in (408, 425, 429) or code >= 500:
        return _Broken(f"{code} {reason}")
    return ModelError(f"{url}: the server answered {code} {reason}")
