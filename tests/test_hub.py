"""hf: downloads, against a server on the loopback interface that also misbehaves."""

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from reference_models import download as download_module
from reference_models.download import download
from reference_models.errors import ModelError
from reference_models.hub import cache_folder, resolve, shard_names

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 1200  # 307,200 bytes: several blocks
CONFIG = b'{"model_type": "vit"}'


class Hub(ThreadingHTTPServer):
    """A hub in small: `files` by name; large files are declared and redirected as the real one does."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"config.json": CONFIG, "vocab.txt": b"[PAD]\n", "model.safetensors": WEIGHTS}
        self.large = {"model.safetensors", "a.safetensors", "b.safetensors", "pytorch_model.bin"}
        self.declare: dict[str, dict] = {}  # name -> headers that override the true ones
        self.break_after: dict[
            str, list[int]
        ] = {}  # name -> bytes to send before closing, request by request
        self.send: dict[str, bytes] = {}  # name -> bytes sent in place of the true ones
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
        hub.seen.append((self.path, dict(self.headers)))
        if hub.status.get(name):
            return self.answer(hub.status[name].pop(0))
        if self.path.startswith("/old/"):  # a renamed model
            return self.answer(307, {"Location": self.path.replace("/old/", "/org/")})
        if (
            hub.token
            and "/resolve/" in self.path
            and self.headers.get("Authorization") != f"Bearer {hub.token}"
        ):
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


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    monkeypatch.setattr(download_module, "WAIT", 0)
    monkeypatch.setattr(download_module, "TIMEOUT", 5)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_REVISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def leftovers(folder) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith((".part", ".tmp"))]


def test_downloads_once_and_is_then_used_from_the_cache(hub):
    folder = resolve("hf:org/name")
    assert folder == cache_folder() / "org--name" / "main"
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS and (
        folder / "config.json"
    ).read_bytes() == CONFIG
    assert leftovers(folder) == []
    asked = len(hub.seen)
    assert resolve("hf:org/name") == folder and len(hub.seen) == asked


def test_a_path_is_returned_as_it_is(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path


def test_later_files_are_asked_from_the_commit_of_the_first(hub):
    resolve("hf:org/name@refs/pr/1")
    revisions = Counter(
        path.split("/resolve/")[1].rpartition("/")[0] for path, _ in hub.seen if "/resolve/" in path
    )
    assert revisions.pop("refs%2Fpr%2F1") == 1 and set(revisions) == {COMMIT}


def test_a_renamed_model_is_followed(hub):
    assert (resolve("hf:old/name") / "config.json").read_bytes() == CONFIG


@pytest.mark.parametrize("stops", [[1000], [70_000, 1, 100_000, 5]])
def test_a_broken_download_is_resumed_where_it_stopped(hub, stops):
    hub.break_after["model.safetensors"] = list(stops)
    folder = resolve("hf:org/name")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    starts = [headers.get("Range") for path, headers in hub.seen if path == "/blobs/model.safetensors"]
    expected = [None] + [f"bytes={sum(stops[: i + 1])}-" for i in range(len(stops))]
    assert starts == expected and leftovers(folder) == []


def test_a_later_run_goes_on_from_what_an_earlier_one_kept(hub):
    hub.break_after["model.safetensors"] = [5000] + [0] * 50
    with pytest.raises(ModelError, match="5000 of 307200 bytes.*run again"):
        resolve("hf:org/name")
    folder = cache_folder() / "org--name" / "main"
    assert not (folder / "model.safetensors").exists() and len(leftovers(folder)) == 1
    hub.break_after.clear()
    hub.seen.clear()
    assert (resolve("hf:org/name") / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.requests("model.safetensors")[0]["Range"] == "bytes=5000-"
    assert hub.requests("vocab.txt") == []  # whole, and of the same commit


def test_a_file_that_changed_in_between_is_not_glued_together(hub):
    hub.break_after["model.safetensors"] = [5000] + [0] * 50
    with pytest.raises(ModelError):
        resolve("hf:org/name")
    hub.break_after.clear()
    hub.files["model.safetensors"] = WEIGHTS[::-1]
    assert (resolve("hf:org/name") / "model.safetensors").read_bytes() == WEIGHTS[::-1]


def test_a_server_without_ranges_starts_over(hub):
    hub.ranges = False
    hub.break_after["model.safetensors"] = [5000, 6000]
    assert (resolve("hf:org/name") / "model.safetensors").read_bytes() == WEIGHTS


def test_a_part_damaged_on_disk_is_fetched_anew(hub):
    hub.break_after["model.safetensors"] = [5000] + [0] * 50
    with pytest.raises(ModelError):
        resolve("hf:org/name")
    hub.break_after.clear()
    folder = cache_folder() / "org--name" / "main"
    part = next(path for path in folder.iterdir() if path.suffix == ".part")
    part.write_bytes(b"\xff" * 5000)
    assert (resolve("hf:org/name") / "model.safetensors").read_bytes() == WEIGHTS
    part.write_bytes(WEIGHTS)  # whole, but never renamed
    (folder / "model.safetensors").unlink()
    assert (resolve("hf:org/name") / "model.safetensors").read_bytes() == WEIGHTS and leftovers(folder) == []


@pytest.mark.parametrize("name, kind", [("model.safetensors", "sha256"), ("config.json", "git sha1")])
def test_wrong_bytes_are_refused_and_not_kept(hub, name, kind):
    true = hub.files[name]
    hub.send[name] = true[:-1] + bytes([true[-1] ^ 1])
    with pytest.raises(ModelError, match=f"{name}.*wrong bytes: {kind}"):
        resolve("hf:org/name")
    folder = cache_folder() / "org--name" / "main"
    assert not (folder / name).exists() and leftovers(folder) == []


@pytest.mark.parametrize("sent", [WEIGHTS + b"x", WEIGHTS[:-7]])
def test_wrong_sizes_are_refused(hub, sent):
    hub.send["model.safetensors"] = sent
    with pytest.raises(ModelError, match="wrong size|bytes"):
        resolve("hf:org/name")
    assert not (cache_folder() / "org--name" / "main" / "model.safetensors").exists()


def test_a_wrong_declared_size_is_refused(hub):
    hub.declare["model.safetensors"] = {"X-Linked-Size": "12"}
    with pytest.raises(ModelError, match="more than the 12 bytes declared"):
        resolve("hf:org/name")


def test_shards_are_fetched_through_the_index(hub):
    index = {"metadata": {"total_size": 8}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    hub.files = {
        **{"config.json": CONFIG, "model.safetensors.index.json": json.dumps(index).encode()},
        **{"a.safetensors": b"aaaa", "b.safetensors": b"bbbb", "pytorch_model.bin": b"pickle"},
    }
    folder = resolve("hf:org/name")
    assert (folder / "a.safetensors").read_bytes() == b"aaaa" and (
        folder / "b.safetensors"
    ).read_bytes() == b"bbbb"
    assert hub.requests("pytorch_model.bin") == []
    (folder / "b.safetensors").unlink()  # noticed, and only it is fetched again
    hub.seen.clear()
    assert (resolve("hf:org/name") / "b.safetensors").exists() and hub.requests("a.safetensors") == []


@pytest.mark.parametrize(
    "evil",
    ["../../evil.safetensors", "/tmp/evil.safetensors", "..\\evil.safetensors", "sub/a.safetensors"]
    + [
        "config.json",
        ".hidden.safetensors",
        "a.safetensors?x=.safetensors",
        "a.safetensors\n",
        "",
        3,
        None,
        "a.bin",
    ],
)
def test_an_index_cannot_name_files_outside_the_cache(hub, evil, tmp_path):
    index = {"weight_map": {"x": evil}}
    hub.files = {"config.json": CONFIG, "model.safetensors.index.json": json.dumps(index).encode()}
    with pytest.raises(ModelError, match="index.json, key x"):
        resolve("hf:org/name")
    assert not list(tmp_path.rglob("*evil*")) and not any("evil" in path for path, _ in hub.seen)


def test_an_index_without_a_map_is_named(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {}}'):
        path.write_text(text)
        with pytest.raises(ModelError, match="key weight_map"):
            shard_names(path)


def test_a_pickle_is_fetched_only_without_safetensors(hub):
    hub.files = {"config.json": CONFIG, "pytorch_model.bin": b"pickle"}
    assert (resolve("hf:org/name") / "pytorch_model.bin").read_bytes() == b"pickle"
    hub.files["model.safetensors"] = WEIGHTS
    assert not (resolve("hf:org/other") / "pytorch_model.bin").exists()


def test_a_missing_model_or_missing_weights_are_named(hub):
    hub.files = {"config.json": CONFIG}
    with pytest.raises(ModelError, match="hf:org/name: has no weights.*pytorch_model.bin"):
        resolve("hf:org/name")
    hub.files = {}
    with pytest.raises(ModelError, match="no config.json at http://127.*name"):
        resolve("hf:org/other")


def test_a_private_model_needs_the_token_and_the_token_is_sent(hub, monkeypatch):
    hub.token = "secret"
    with pytest.raises(ModelError, match="401.*set HF_TOKEN"):
        resolve("hf:org/name")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ModelError, match="401.*HF_TOKEN was sent") as caught:
        resolve("hf:org/name")
    assert "wrong" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert (resolve("hf:old/name") / "config.json").exists()  # also over a redirect on the same host


def test_the_token_never_goes_to_another_host(hub, monkeypatch):
    other = Hub()
    try:
        hub.redirect_to, hub.token = other.url, "secret"
        monkeypatch.setenv("HF_TOKEN", "secret")
        assert (resolve("hf:org/name") / "model.safetensors").read_bytes() == WEIGHTS
        assert [path for path, _ in other.seen] == ["/blobs/model.safetensors"]
        assert "secret" not in json.dumps(other.seen)
        assert all(
            headers["Authorization"] == "Bearer secret" for headers in hub.requests("model.safetensors")
        )
    finally:
        other.shutdown()
        other.server_close()


def test_another_host_cannot_change_what_the_hub_declared(hub):
    other = Hub()
    try:
        hub.redirect_to = other.url
        forged = WEIGHTS[:-1] + b"!"
        other.files["model.safetensors"] = forged
        digest = hashlib.sha256(forged).hexdigest()
        other.declare["model.safetensors"] = {"ETag": digest, "X-Linked-ETag": digest}
        with pytest.raises(ModelError, match="wrong bytes: sha256"):
            resolve("hf:org/name")
    finally:
        other.shutdown()
        other.server_close()


def test_another_host_declares_nothing_where_the_hub_is_silent(hub):
    other = Hub()
    try:
        hub.redirect_to = other.url
        hub.declare["model.safetensors"] = {"X-Linked-ETag": "", "X-Linked-Size": ""}
        other.declare["model.safetensors"] = {
            "ETag": "0" * 64,
            "X-Linked-ETag": "0" * 64,
            "X-Linked-Size": "1",
        }
        assert (resolve("hf:org/name") / "model.safetensors").read_bytes() == WEIGHTS
    finally:
        other.shutdown()
        other.server_close()


@pytest.mark.parametrize(
    "place, words", [("file:///etc/hostname", "not allowed"), ("ftp://x/y", "redirects to ftp:")]
)
def test_a_redirect_away_from_http_is_not_followed(hub, place, words):
    hub.declare["model.safetensors"] = {"Location": place}
    with pytest.raises(ModelError, match=words):
        resolve("hf:org/name")


def test_passing_troubles_are_tried_again_and_lasting_ones_named(hub):
    hub.status = {"config.json": [503, 429, 500], "model.safetensors": [502]}
    folder = resolve("hf:org/name")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    hub.status = {"config.json": [503] * 99}
    with pytest.raises(ModelError, match="failed 5 times.*503"):
        resolve("hf:org/other")
    hub.status = {"config.json": [418]}
    with pytest.raises(ModelError, match="418"):
        resolve("hf:org/third")


def test_no_server_is_an_error_for_people(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="127.0.0.1:9.*failed 5 times"):
        resolve("hf:org/name")
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc")
    with pytest.raises(ModelError, match="HF_ENDPOINT"):
        resolve("hf:org/name")


def test_offline_uses_the_cache_and_asks_nobody(hub, monkeypatch):
    folder = resolve("hf:org/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.seen.clear()
    assert resolve("hf:org/name") == folder
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE.*org--missing"):
        resolve("hf:org/missing")
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match="no complete copy"):
        resolve("hf:org/name")
    assert hub.seen == []


@pytest.mark.parametrize(
    "spec", ["hf:", "hf:a/b/c", "hf:../x", "hf:org/..", "hf:org/name@", "hf:org/name@../../x"]
)
def test_malformed_names_are_refused_before_anything_is_asked(hub, spec):
    with pytest.raises(ModelError, match="hf:"):
        resolve(spec)
    assert hub.seen == []


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "minilora"
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "huggingface" / "minilora"


def test_two_at_once_download_once(hub):
    folders: list = []
    threads = [threading.Thread(target=lambda: folders.append(resolve("hf:org/name"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1 and len(hub.requests("model.safetensors")) == 1


def test_a_full_disk_is_named(hub, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download_module.os, "fsync", full)
    with pytest.raises(ModelError, match="config.json.*No space left"):
        download(f"{hub.url}/org/name/resolve/main/config.json", tmp_path / "config.json")
    assert not (tmp_path / "config.json").exists()
