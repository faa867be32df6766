"""The downloader, against a server on the loopback interface: complete or nothing, and nothing outside DIR."""

import hashlib
import io
import stat
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from minilora.commands import download
from minilora.commands.download import Archive, DataSet, fetch, main, unpack
from minilora.errors import RunError, UserError


class Quiet(SimpleHTTPRequestHandler):
    asked: list[str] = []

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()


@pytest.fixture
def server(tmp_path):
    """(folder that is served, its address)"""
    folder = tmp_path / "served"
    folder.mkdir()
    Quiet.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def make_zip(path, files, mode=None):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (mode or stat.S_IFREG | 0o644) << 16
            archive.writestr(info, content)
    return path


def make_tar(path, files, kind=tarfile.REGTYPE, link=""):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content) if kind == tarfile.REGTYPE else 0, kind, link
            archive.addfile(info, io.BytesIO(content.encode()))
    return path


def one_set(monkeypatch, archive: Archive, pictures=None):
    monkeypatch.setitem(download.SETS, "imagewoof", DataSet((archive,), "set", "imagewoof-vit-tiny", pictures))


def test_visual7w_lands_where_the_reader_wants_it(server, tmp_path, capsys):
    folder, address = server
    make_zip(folder / "dataset_v7w_telling.zip", {"dataset_v7w_telling.json": "{}"})
    make_zip(folder / "visual7w_images.zip", {"images/v7w_1.jpg": "x", "images/v7w_2.jpg": "y"})
    assert main(["visual7w", str(tmp_path / "v7w"), "--mirror", address]) == 0
    assert "python train.py --recipe choice-clip --data-dir" in capsys.readouterr().out
    found = sorted(path.relative_to(tmp_path / "v7w").as_posix() for path in (tmp_path / "v7w").rglob("*"))
    assert found == [".downloaded.json", "dataset_v7w_telling.json", "images", "images/v7w_1.jpg", "images/v7w_2.jpg"]
    asked = len(Quiet.asked)
    assert (tmp_path / "v7w" / "images" / "v7w_2.jpg").read_text() == "y"
    assert main(["visual7w", str(tmp_path / "v7w"), "--mirror", address]) == 0
    assert len(Quiet.asked) == asked
    (tmp_path / "v7w" / ".downloaded.json").write_text("{")
    assert main(["visual7w", str(tmp_path / "v7w"), "--mirror", address]) == 0
    assert len(Quiet.asked) == 2 * asked


def test_a_mirror_of_the_environment_is_used_and_pictures_are_counted(server, tmp_path, monkeypatch):
    folder, address = server
    make_tar(folder / "a.tgz", {"set/train/n1/1.JPEG": "x", "set/val/n1/2.JPEG": "y"})
    monkeypatch.setenv("MINILORA_MIRROR", address + "/")
    one_set(monkeypatch, Archive("https://example.org/there/a.tgz"), pictures=2)
    assert fetch("imagewoof", tmp_path / "d") == tmp_path / "d" / "set"
    one_set(monkeypatch, Archive("https://example.org/there/a.tgz"), pictures=3)
    with pytest.raises(RunError, match="2 pictures instead of 3"):
        fetch("imagewoof", tmp_path / "e")


@pytest.mark.parametrize("wrong", [{"size": 5}, {"md5": "0" * 32}])
def test_wrong_size_or_checksum_leaves_nothing(server, tmp_path, monkeypatch, wrong):
    folder, address = server
    content = make_zip(folder / "a.zip", {"set/1.txt": "x"}).read_bytes()
    one_set(monkeypatch, Archive("https://example.org/a.zip", **wrong))
    with pytest.raises(RunError, match="repeat the command"):
        fetch("imagewoof", tmp_path / "d", address)
    assert list((tmp_path / "d").iterdir()) == []
    right = Archive("https://example.org/a.zip", len(content), hashlib.md5(content).hexdigest())
    one_set(monkeypatch, right)
    assert (fetch("imagewoof", tmp_path / "d", address) / "1.txt").read_text() == "x"


def test_a_missing_file_a_dead_server_and_an_unknown_name_are_one_line_each(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("reference_models.files.download.WAIT", 0)
    _, address = server
    for base in (address, "http://127.0.0.1:9"):
        assert main(["visual7w", str(tmp_path / "d"), "--mirror", base]) == 1
        error = capsys.readouterr().err
        assert ("not found" in error or "download failed" in error) and error.count("\n") == 1
    assert list((tmp_path / "d").iterdir()) == []
    with pytest.raises(UserError, match="imagewoof, vqa2, visual7w"):
        fetch("imagenet", tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["vqa2", str(tmp_path / "file" / "d")]) == 2


HOSTILE = ["../evil.txt", "a/../../evil.txt", "/tmp/evil.txt", "..\\evil.txt", "C:\\evil.txt"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_members_outside_the_folder_stop_everything(tmp_path, make, name):
    root = tmp_path / "root"
    root.mkdir()
    path = make(tmp_path / "a.archive", {"fine.txt": "x", name: "y"})
    with pytest.raises(RunError, match="would land outside"):
        unpack(path, root)
    assert list(root.iterdir()) == [] and not (tmp_path / "evil.txt").exists()


def test_links_and_devices_are_refused(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    archives = [make_zip(tmp_path / "l.zip", {"link": "/etc"}, stat.S_IFLNK | 0o777)]
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        archives.append(make_tar(tmp_path / f"{kind!r}.tgz", {"member": ""}, kind, "/etc/passwd"))
    for path in archives:
        with pytest.raises(RunError, match="is a link or a device"):
            unpack(path, root)
    assert list(root.iterdir()) == []


def test_a_damaged_archive_is_named(tmp_path):
    whole = make_tar(tmp_path / "a.tgz", {f"{i}.txt": str(i) * 999 for i in range(50)}).read_bytes()
    for content in (b"", b"<html>", whole[: len(whole) // 2]):
        (tmp_path / "a.tgz").write_bytes(content)
        with pytest.raises(RunError, match="a.tgz: cannot be unpacked"):
            unpack(tmp_path / "a.tgz", tmp_path / "root")


def test_an_archive_larger_than_the_disk_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "a.zip", {"a.txt": "x" * 1000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(RunError, match="needs 0.0 GB unpacked"):
        unpack(path, tmp_path)
    assert not (tmp_path / "a.txt").exists()


def torn(content: bytes, kind: str) -> bytes:
    """An archive to which something has happened on its way."""
    if kind == "cut":
        return content[: len(content) * 2 // 3]
    if kind == "flipped":
        at = len(content) - 30 if content[:2] == b"\x1f\x8b" else len(content) // 2
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    return {"page": b"<!doctype html><p>Please log in", "empty": b"", "half a crc": content[:-5]}[kind]


@pytest.mark.parametrize("kind", ["cut", "flipped", "page", "empty", "half a crc"])
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_a_damaged_archive_without_a_known_checksum_gets_no_final_name(server, tmp_path, monkeypatch, make, kind):
    """A flipped bit in the last member, behind which only the checksum of gzip tells of it; the next try succeeds."""
    folder, address = server
    name = "a.zip" if make is make_zip else "a.tgz"
    content = make(folder / name, {"set/1.txt": "x" * 5000, "set/2.txt": "".join(map(str, range(3000)))}).read_bytes()
    (folder / name).write_bytes(torn(content, kind))
    one_set(monkeypatch, Archive(f"https://example.org/{name}"))
    with pytest.raises(RunError, match="repeat the command to try again") as caught:
        fetch("imagewoof", tmp_path / "d", address)
    there = {path.name for path in (tmp_path / "d").iterdir()}
    assert "\n" not in str(caught.value) and there <= {"set"} and (make is make_zip or not there)
    (folder / name).write_bytes(content)
    assert (fetch("imagewoof", tmp_path / "d", address) / "1.txt").read_text() == "x" * 5000


def test_a_download_that_breaks_off_is_resumed_by_the_next_command(tmp_path, monkeypatch, hub):
    content = make_zip(tmp_path / "a.zip", {"set/1.txt": "x" * 200_000}).read_bytes()
    hub.files["a.zip"], hub.break_after["a.zip"] = content, [100_000] + [0] * 5
    one_set(monkeypatch, Archive("https://example.org/a.zip"))
    with pytest.raises(RunError, match="the 100000 bytes so far are kept"):
        fetch("imagewoof", tmp_path / "d", hub.url)
    assert (fetch("imagewoof", tmp_path / "d", hub.url) / "1.txt").stat().st_size == 200_000
    assert hub.seen[-1][1]["Range"] == "bytes=100000-"
    assert {path.name for path in (tmp_path / "d").iterdir()} == {"set", ".downloaded.json"}


def nameless(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("x"), "y")
        archive.filelist[0].filename = archive.filelist[0].orig_filename = ""
    return path


def odd_archives(folder):
    """(archive, what its refusal says)"""
    plain = {"a.txt": "x" * 100}
    yield nameless(folder / "empty.zip"), "no usable name"
    yield make_zip(folder / "deep.zip", {"a/" * 1000 + "x.txt": "x"}), "no usable name"
    yield make_tar(folder / "deep.tgz", {"a/" * 1000 + "x.txt": "x"}), "no usable name"
    yield make_zip(folder / "long.zip", {"a" * 5000: "x"}), "no usable name"
    yield make_zip(folder / "name.zip", {"a" * 300: "x"}), "cannot be unpacked"
    yield make_zip(folder / "both.zip", {"a": "x", "a/b": "y"}), "cannot be unpacked"
    encrypted = make_zip(folder / "encrypted.zip", plain)
    content = bytearray(encrypted.read_bytes())
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(mark) + place] |= 1
    encrypted.write_bytes(content)
    yield encrypted, "is encrypted"
    for method in (99, 12, 14, 93):
        unknown = make_zip(folder / f"method{method}.zip", plain)
        content = bytearray(unknown.read_bytes())
        for mark, place in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
            content[content.index(mark) + place] = method
        unknown.write_bytes(content)
        yield unknown, "cannot be unpacked"


def test_odd_archives_are_one_sentence_each(tmp_path):
    """Members without a name, 1,000 folders deep, encrypted, packed in unknown ways, two in one place."""
    for path, reason in odd_archives(tmp_path):
        root = tmp_path / "root"
        root.mkdir(exist_ok=True)
        with pytest.raises(RunError, match=reason) as caught:
            unpack(path, root)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500, path
