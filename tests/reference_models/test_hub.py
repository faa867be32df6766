"""hf: downloads, against a server on the loopback interface that also misbehaves."""

import hashlib
import json
import threading
import types
from collections import Counter

import pytest

from minilora.settings.exit_codes import run
from reference_models.errors import ModelError
from reference_models.files import download as download_module
from reference_models.files.download import download
from reference_models.files.hub import cache_folder, resolve, shard_names
from tests.support.hub_server import COMMIT, CONFIG, WEIGHTS, Hub


def leftovers(folder) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith((".part", ".tmp"))]


def test_downloads_once_and_is_then_used_from_the_cache(hub):
    folder = resolve("hf:org/name")
    assert folder == cache_folder() / "org--name" / "main"
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS and (folder / "config.json").read_bytes() == CONFIG
    assert leftovers(folder) == []
    asked = len(hub.seen)
    assert resolve("hf:org/name") == folder and len(hub.seen) == asked


def test_a_download_is_silent_in_a_library_and_a_line_on_stderr_in_a_program(hub, monkeypatch, tmp_path, capsys):
    resolve("hf:org/name")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "another home"))
    assert run(lambda _: resolve("hf:org/name") and 0, (ModelError,)) == 0
    url = f"{hub.url}/org/name/resolve/{COMMIT}/model.safetensors"
    assert capsys.readouterr() == ("", f"downloading {url}\n")


def test_a_path_is_returned_as_it_is(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path


def test_later_files_are_asked_from_the_commit_of_the_first(hub):
    resolve("hf:org/name@refs/pr/1")
    revisions = Counter(path.split("/resolve/")[1].partition("/")[0] for path, _ in hub.seen if "/resolve/" in path)
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
    with pytest.raises(ModelError, match=f"5000 of {len(WEIGHTS)} bytes.*run again"):
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
    assert (folder / "a.safetensors").read_bytes() == b"aaaa" and (folder / "b.safetensors").read_bytes() == b"bbbb"
    assert hub.requests("pytorch_model.bin") == []
    (folder / "b.safetensors").unlink()  # noticed, and only it is fetched again
    hub.seen.clear()
    assert (resolve("hf:org/name") / "b.safetensors").exists() and hub.requests("a.safetensors") == []


@pytest.mark.parametrize(
    "evil",
    ["../../evil.safetensors", "/tmp/evil.safetensors", "..\\evil.safetensors", "sub/a.safetensors"]
    + ["config.json", ".hidden.safetensors", "a.safetensors?x=.safetensors", "a.safetensors\n", "", 3, None, "a.bin"],
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
        assert all(headers["Authorization"] == "Bearer secret" for headers in hub.requests("model.safetensors"))
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
        other.declare["model.safetensors"] = {"ETag": "0" * 64, "X-Linked-ETag": "0" * 64, "X-Linked-Size": "1"}
        assert (resolve("hf:org/name") / "model.safetensors").read_bytes() == WEIGHTS
    finally:
        other.shutdown()
        other.server_close()


@pytest.mark.parametrize("place, words", [("file:///etc/hostname", "not allowed"), ("ftp://x/y", "redirects to ftp:")])
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


@pytest.mark.parametrize("spec", ["hf:", "hf:a/b/c", "hf:../x", "hf:org/..", "hf:org/name@", "hf:org/name@../../x"])
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


# ---- servers that lie, addresses that are none, secrets ------------------------------------------------------


def left_in_the_cache():
    """Files that a later call would take for the checkpoint."""
    folder = cache_folder() / "org--name" / "main"
    return {path.name for path in folder.iterdir()} - {".lock", ".minilora.json"}


@pytest.mark.parametrize(
    "place",
    ["http://127.0.0.1:99999/", "http://[::1/", "http://:0x/", "http://a b/", "http://" + "a" * 300, "//"]
    + ["http://127.0.0.1:-1/x", "https://" + "x" * 70 + ".org/"],
)
def test_a_redirect_to_an_address_that_is_none_is_a_sentence(hub, monkeypatch, place):
    monkeypatch.setattr(download_module, "TRIES", 1)
    hub.declare["model.safetensors"] = {"Location": place.encode().decode("latin-1")}
    with pytest.raises(ModelError) as caught:
        resolve("hf:org/name")
    assert "model.safetensors: " in str(caught.value) and "\n" not in str(caught.value)


def test_redirects_end(hub):
    hub.declare["model.safetensors"] = {"Location": f"{hub.url}/org/name/resolve/main/model.safetensors"}
    with pytest.raises(ModelError, match="infinite loop"):
        resolve("hf:org/name")
    assert len(hub.requests("model.safetensors")) < 20


@pytest.mark.parametrize("token", ["hf_ge\nheim", "hf_ge\r\nX-Header: heim", "hf_ge\u2028heim"])
def test_a_token_that_cannot_be_sent_is_not_shown(hub, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ModelError, match="or HF_TOKEN is no token") as caught:
        resolve("hf:org/name")
    assert "heim" not in str(caught.value) and "hf_ge" not in str(caught.value) and hub.seen == []


def test_a_password_in_the_address_is_never_shown(hub, monkeypatch, caplog):
    caplog.set_level("INFO")
    told = ""
    for endpoint in (hub.url.replace("//", "//tom:geheim@"), "ftp://tom:geheim@x", "http://tom:ge@heim@127.0.0.1:9/a"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with pytest.raises(ModelError, match="//127.0.0.1|//x") as caught:
            resolve("hf:org/name")
        told += str(caught.value)
    assert "tom" not in told + caplog.text and "heim" not in told + caplog.text


def test_what_follows_the_question_mark_is_not_shown():
    shown = download_module.shown
    assert shown("https://a:b@c.org:8/d/e?X-Signature=geheim") == "https://c.org:8/d/e"
    assert shown("http://[::1/") == "http://[::1/" and shown("nonsense") == "nonsense"


@pytest.mark.parametrize("status", [202, 203, 204, 205])
def test_an_answer_without_a_file_is_no_file(hub, status):
    hub.status = {"config.json": [status]}
    with pytest.raises(ModelError, match=f"answered {status} .*sent no file"):
        resolve("hf:org/name")
    assert left_in_the_cache() == set()


@pytest.mark.parametrize(
    "page", [b"<html>login</html>", b"\n <!DOCTYPE html>\n<p>", b"<!-- portal --><HTML>", b"\xef\xbb\xbf{}x"]
)
@pytest.mark.parametrize("typed", [True, False])
def test_the_login_page_of_a_network_is_not_taken_for_a_checkpoint(hub, page, typed):
    """With its type and without it, in every file's place; nothing of it stays, and the next try succeeds."""
    for name in hub.files:
        hub.send[name] = page
        hub.declare[name] = {"ETag": "", "Content-Length": len(page)} | (
            {"Content-Type": "text/html; a=b"} if typed else {}
        )
    with pytest.raises(ModelError, match="a web page|sent something else than the file"):
        resolve("hf:org/name")
    assert left_in_the_cache() == set()
    hub.send, hub.declare = {}, {}
    assert (resolve("hf:org/name") / "config.json").read_bytes() == CONFIG


def test_weights_that_are_cut_where_nobody_declares_their_size_are_not_kept(hub):
    hub.large = set()
    hub.send["model.safetensors"] = WEIGHTS[:-9]
    hub.declare["model.safetensors"] = {"ETag": '"abc"', "Content-Length": len(WEIGHTS) - 9}
    with pytest.raises(ModelError, match="not a readable safetensors file.*sent something else"):
        resolve("hf:org/name")
    assert "model.safetensors" not in left_in_the_cache()


def test_a_small_file_without_end_is_given_up_early(hub, monkeypatch):
    monkeypatch.setattr("reference_models.files.hub.SMALL", 1 << 20)
    hub.endless["config.json"] = (b" " * 65536, 0)
    with pytest.raises(ModelError, match="more than 1,048,576 bytes; no such file is that long"):
        resolve("hf:org/name")
    assert left_in_the_cache() == set()


def test_weights_without_end_leave_room_on_the_disk(hub, monkeypatch):
    monkeypatch.setattr(download_module.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1 << 20))
    hub.endless["model.safetensors"] = (b" " * 65536, 0)
    with pytest.raises(ModelError, match="more than 943,718 bytes"):
        resolve("hf:org/name")
    assert "model.safetensors" not in left_in_the_cache() and leftovers(cache_folder() / "org--name" / "main") == []


def test_a_server_that_drips_is_given_up(hub, monkeypatch):
    """Each byte comes in time, the file would take years."""
    monkeypatch.setattr(download_module, "TIMEOUT", 0.1)
    hub.endless["config.json"] = (b"x", 0.02)
    with pytest.raises(ModelError, match="given up, only .* bytes came in"):
        resolve("hf:org/name")


def test_a_server_that_says_nothing_is_given_up(hub, monkeypatch):
    monkeypatch.setattr(download_module, "TIMEOUT", 0.1)
    monkeypatch.setattr(download_module, "TRIES", 2)
    hub.endless["config.json"] = (b"", 0.5)
    with pytest.raises(ModelError, match="failed 2 times .*timed out"):
        resolve("hf:org/name")


@pytest.mark.parametrize(
    "proxy", ["http://127.0.0.1:9", "http://tom:geheim@127.0.0.1:9", "nonsense", "socks5://127.0.0.1:9"]
)
def test_a_proxy_that_does_not_answer_is_a_sentence(hub, monkeypatch, proxy):
    monkeypatch.setattr(download_module, "TRIES", 1)
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(ModelError, match="config.json: ") as caught:
        resolve("hf:org/name")
    assert "\n" not in str(caught.value) and "geheim" not in str(caught.value) and hub.seen == []
