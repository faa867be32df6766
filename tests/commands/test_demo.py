"""commands/demo: the answers are run.predict's; strangers and files stay out; the page in a real browser."""

import gc
import http.client
import io
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from base64 import b64decode
from collections import Counter
from contextlib import suppress
from functools import partial
from urllib.parse import urlencode

import pytest
import torch
from PIL import Image

from minilora.commands.demo import Demo, DemoConfig, Handler, Server, main
from minilora.errors import UserError
from minilora.inject import disable_lora
from minilora.tasks import load_run
from tests.support.choice_data import write_clip
from tests.support.chromium import CHROMIUM, Chromium
from tests.support.cli_data import ROOT, write_photos
from tests.support.tiny_tasks import run_quickly

RUNS = ROOT / "tests/fixtures/runs_0.1"
QUERIES = {
    "classify": {},
    "vqa": {"question": "what shape is it?"},
    "choice": {"question": "what is it?", "choices": ["a red circle", "a blue square", "größer, & gelb"]},
    "names": {"classes": ["a red cat", "the dog"]},
}


def png(seed=0, size=(60, 40)):
    generator = torch.Generator().manual_seed(seed)  # its own: several threads draw at once
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def bomb():
    """A PNG of 30000 x 30000 pixels in a few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """The three runs of version 0.1, and one whose classes are sentences."""
    root = tmp_path_factory.mktemp("demo")
    photos, clip = write_photos(root / "photos", train=4, val=2, classes=3), write_clip(root / "clip")
    words = ["--model", clip, "--data-dir", photos, "--max-steps", "1", "--device", "cpu", "--workers", "0"]
    with pytest.MonkeyPatch.context() as patch:
        run_quickly([*words, "--batch-size", "4", "--output", root / "names"], patch)
    runs = [load_run(path) for path in (RUNS / "classify", RUNS / "vqa", RUNS / "choice", root / "names")]
    for run in runs:  # B is near 0 after so few steps
        run.amp = "fp32"
    return {run.name: Demo(run.name, run, 3) for run in runs}


@pytest.fixture(scope="module")
def server(demos):
    server = Server("127.0.0.1", 0, demos)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server, body=b"", path="/api/answer", method="POST", headers=(), **query):
    """(status, content): json, or the page as text."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    query = f"?{urlencode(query, doseq=True)}" if query else ""
    try:
        connection.request(method, path + query, body, dict(headers))
        reply = connection.getresponse()
        text = reply.read().decode()
        return reply.status, json.loads(text) if "json" in reply.headers["Content-Type"] else text
    finally:
        connection.close()


def raw(server, data, wait=30):
    """The whole reply to bytes that need not be a request."""
    with socket.create_connection(server.server_address, timeout=wait) as connection:
        connection.sendall(data)
        parts = []
        while part := connection.recv(2**16):
            parts.append(part)
    return b"".join(parts)


def predicted(run, body, **texts):
    (answers,) = run.predict([Image.open(io.BytesIO(body))], **texts)
    return [list(pair) for pair in answers]


# ---- answers


@pytest.mark.parametrize("name", QUERIES)
def test_an_answer_is_that_of_predict_and_base_is_that_of_disable_lora(server, demos, name):
    run = demos[name].run
    status, found = ask(server, png(), run=name, **QUERIES[name])
    assert status == 200 and list(found) == ["run", "answers", "milliseconds"] and found["run"] == name
    assert found["answers"] == predicted(run, png(), **QUERIES[name]) and found["milliseconds"] > 0
    shown = ask(server, png(), path="/answer", run=name, **QUERIES[name])[1]
    assert shown["answers"] == found["answers"] != shown["base"]["answers"]
    with disable_lora(run.model):
        assert shown["base"]["answers"] == predicted(run, png(), **QUERIES[name])


def test_named_classes_are_for_one_question_and_the_runs_own_come_back(server, demos):
    own = predicted(demos["names"].run, png())
    assert {label for label, _ in ask(server, png(), run="names", classes=["x y", "z"])[1]["answers"]} == {"x y", "z"}
    assert ask(server, png(), run="names")[1]["answers"] == own


@pytest.mark.parametrize("name", QUERIES)
def test_attention_has_a_picture_for_every_layer_with_and_without_lora(server, demos, name):
    found = ask(server, png(), path="/answer", run=name, **QUERIES[name])[1]
    model = demos[name].run.model
    depth = len(getattr(model, "vision", model).blocks)
    assert list(found["attention"]) == [*(f"layer {n}" for n in range(1, depth + 1)), "rollout"]
    assert found["base"]["attention"].keys() == found["attention"].keys()
    for uri in found["attention"].values():
        assert Image.open(io.BytesIO(b64decode(uri.partition(",")[2]))).size == (224, 224)
    assert found["base"]["attention"]["rollout"] != found["attention"]["rollout"]


def test_the_first_run_answers_where_none_is_named(server):
    assert ask(server, png())[1] | {"milliseconds": 0} == ask(server, png(), run="classify")[1] | {"milliseconds": 0}


def test_samples_are_pictures_of_the_runs_data_that_can_be_asked_about(server, demos):
    for name, demo in demos.items():
        assert "/" not in demo.about["about"]  # no folder is named
        assert len(demo.about["samples"]) == 3
        first = demo.about["samples"][0]
        texts = {key: first[key] for key in demo.takes if key != "classes"}
        if name == "choice":
            texts["choices"] = texts["choices"].split("\n")
        assert ask(server, b64decode(first["image"].partition(",")[2]), run=name, **texts)[0] == 200


def test_what_the_page_knows_of_a_run_cannot_end_its_script(demos):
    strange = Demo("</script><script>x", demos["classify"].run, 0)
    server = Server("127.0.0.1", 0, {strange.name: strange})
    server.server_close()
    assert server.page.count("</script>") == 1 and r"\u003c/script>" in server.page and "{{" not in server.page


def at_once(jobs):
    """What each of several functions gives, all called at the same time."""
    found = [None] * len(jobs)
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, jobs[i]())) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_several_at_once_get_the_answers_of_their_own_pictures(server, demos):
    expected = [predicted(demos["classify"].run, png(seed)) for seed in range(8)]
    jobs = [lambda seed=seed: ask(server, png(seed), path="/answer")[1]["answers"] for seed in range(8)]
    assert at_once(jobs) == expected


def test_a_model_is_asked_once_at_a_time_while_another_may_answer(server, demos, monkeypatch):
    busy, seen, lock = set(), [], threading.Lock()

    def slowly(name, predict, *args, **texts):
        with lock:
            assert name not in busy
            busy.add(name)
            seen.append(set(busy))
        time.sleep(0.1)
        with lock:
            busy.remove(name)
        return predict(*args, **texts)

    for name in ("classify", "vqa"):
        run = demos[name].run
        monkeypatch.setattr(run, "predict", partial(slowly, name, run.predict), raising=False)
    names = ["classify", "vqa"] * 4
    jobs = [lambda name=name: ask(server, png(), run=name, **QUERIES[name])[0] for name in names]
    assert at_once(jobs) == [200] * 8
    assert len(seen) == 8 and {"classify", "vqa"} in seen


# ---- refusals


@pytest.mark.parametrize(
    ("status", "words", "body", "query"),
    [
        (400, "not a picture of a known format", b"%PDF-1.4", {}),
        (400, "not a picture of a known format", b"<svg xmlns='http://www.w3.org/2000/svg'/>", {}),
        (400, "cannot be decoded", png()[:200], {}),
        (400, "more than 89,478,485 pixels", bomb(), {}),
        (400, "the picture: is not a picture", b"", {}),
        (413, "at most 20,971,520", bytes(20 * 2**20 + 1), {}),
        (400, "a question is missing", png(), {"run": "vqa"}),
        (400, "a question is missing", png(), {"run": "vqa", "question": "  "}),
        (413, "16,010 characters", png(), {"question": "x" * 16_001}),
        (414, "", png(), {"question": "x" * 70_000}),
        (400, "needs --question", png(), {"run": "choice", "question": "what?"}),
        (400, "needs --question", png(), {"run": "choice", "question": " ", "choices": ["a", "b"]}),
        (400, "1 choice; a question needs 2 to 26", png(), {"run": "choice", "question": "a", "choices": "b"}),
        (400, "choice B is empty", png(), {"run": "choice", "question": "a", "choices": ["b", ""]}),
        (400, "question is not for classify", png(), {"question": "what?"}),
        (400, "no name to make a sentence of", png(), {"run": "names", "classes": ["a", " "]}),
        (400, "make the same sentence", png(), {"run": "names", "classes": ["a b", "a_b"]}),
        (400, "image is not for classify", png(), {"image": "/etc/passwd"}),
        (400, "run is one of classify", png(), {"run": "../classify"}),
        (400, "run is one of classify", png(), {"run": ["classify", "vqa"]}),
        (
            400,
            "weights is not for vqa, which takes question",
            png(),
            {"run": "vqa", "question": "a", "weights": "/etc"},
        ),
    ],
)
def test_what_cannot_be_answered_gets_a_sentence(server, status, words, body, query):
    found = ask(server, body, **query)
    assert found[0] == status and list(found[1]) == ["error"]
    assert words in found[1]["error"] and "\n" not in found[1]["error"]


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/../../etc/passwd",
        "//etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2fx",
        "/demo.html",
        "/answer/",
    ],
)
def test_no_path_leads_to_a_file(server, path):
    status, found = ask(server, path=path, method="GET")
    assert (status, found["error"]) == (404, "there are GET /, POST /answer and POST /api/answer")


def first_line(server, *lines, body=b""):
    return raw(server, "\r\n".join([*lines, "", ""]).encode() + body).split(b"\r\n")[0]


def test_each_address_has_one_method_and_a_picture_needs_its_length(server):
    assert ask(server, method="GET")[0] == ask(server, path="/")[0] == ask(server, path="/", method="DELETE")[0] == 405
    assert b" 411 " in first_line(server, "POST /api/answer HTTP/1.1", "Host: localhost")
    assert b" 405 " in first_line(server, "HEAD / HTTP/1.1", "Host: localhost")
    assert b" 404 " in first_line(server, "GET http://localhost/ HTTP/1.1", "Host: localhost")  # for a proxy
    chunked = "POST /api/answer HTTP/1.1", "Host: localhost", "Transfer-Encoding: chunked"
    assert b" 411 " in first_line(server, *chunked, body=b"1\r\nx\r\n0\r\n\r\n")
    assert b" 411 " in first_line(server, *chunked, "Content-Length: 5", body=b"abcde")
    twice = "POST /api/answer HTTP/1.1", "Host: localhost", "Content-Length: 5", "Content-Length: 6"
    assert b" 411 " in first_line(server, *twice, body=b"abcdef")


def test_who_waits_for_100_continue_is_answered(server, demos):
    length = f"Content-Length: {len(png())}"
    head = "POST /api/answer HTTP/1.1", "Host: localhost", length, "Expect: 100-continue", "", ""
    with socket.create_connection(server.server_address, timeout=30) as connection:
        connection.sendall("\r\n".join(head).encode())
        assert connection.recv(100).split()[1] == b"100"
        connection.sendall(png())
        reply = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["answers"] == predicted(demos["classify"].run, png())


FORGED = [{"Host": host} for host in ("evil.example", "127.0.0.1.evil.example:80", "localhost@evil.example", "[x", "")]


@pytest.mark.parametrize("headers", FORGED)
def test_a_foreign_name_for_this_machine_is_refused(server, headers):
    for path, method in (("/", "GET"), ("/answer", "POST"), ("/api/answer", "POST")):
        assert ask(server, png(), path=path, method=method, headers=headers)[0] == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://{host}"])
def test_a_foreign_page_cannot_ask(server, origin):
    host = "{}:{}".format(*server.server_address)
    status, found = ask(server, png(), headers={"Origin": origin.format(host=host)})
    assert (status, found["error"]) == (403, "a page from elsewhere may not ask this server")
    assert ask(server, png(), headers={"Origin": f"http://{host}"})[0] == 200


def test_only_a_server_for_others_takes_any_number_as_its_name(demos):
    server = Server("0.0.0.0", 0, demos)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        assert server.public
        address = "127.0.0.1", server.server_address[1]
        for host, status in (("192.168.7.7:80", b"200"), ("[fe80::1]", b"200"), ("evil.example", b"403")):
            with socket.create_connection(address, timeout=30) as connection:
                connection.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                assert connection.recv(100).split()[1] == status
    finally:
        server.shutdown()
        server.server_close()


def test_a_sender_that_pauses_is_given_up(server, monkeypatch, capfd):
    monkeypatch.setattr(Handler, "timeout", 0.5)
    head = b"POST /api/answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    reply = raw(server, head + b"x")
    assert b" 408 " in reply.split(b"\r\n")[0] and b"the picture is not whole" in reply
    assert raw(server, head[:40]) == b""
    assert capfd.readouterr().err == ""


def test_who_sends_without_end_is_cut_off(server):
    with socket.create_connection(server.server_address, timeout=30) as connection, pytest.raises(ConnectionError):
        connection.sendall(b"POST /api/answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n")
        for _ in range(300):
            connection.sendall(bytes(2**20))


def test_a_fault_of_the_model_is_one_line_for_both_sides(server, demos, monkeypatch, capfd):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(demos["classify"].run, "predict", broken, raising=False)
    status, found = ask(server, png())
    assert status == 500 and found["error"].startswith("the model could not answer")
    assert capfd.readouterr().err == "error: RuntimeError: no such kernel\\nand more\n"


def test_a_run_without_lora_has_no_base(tmp_path, monkeypatch):
    data = write_photos(tmp_path / "photos", train=4, val=2, classes=2)
    words = ["--mode", "linear", "--data-dir", data, "--max-steps", "1", "--device", "cpu", "--batch-size", "4"]
    run_quickly([*words, "--output", tmp_path / "linear"], monkeypatch)
    demo = Demo("linear", load_run(tmp_path / "linear"), 0)
    found = demo.answer(io.BytesIO(png()), {}, True)
    assert "base" not in found and demo.about["samples"] == []
    assert found["answers"] == demo.run.predict([Image.open(io.BytesIO(png()))])[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "RUN; see"),
        (["nowhere"], "no such run directory"),
        (["RUN", "--port", "70000"], "--port must be"),
        (["RUN", "--samples", "x"], "--samples"),
        (["RUN", "--host", "no.such.host.invalid"], "cannot listen there"),
        (["RUN", "--host", ""], "--host"),
        (["RUN", "--prot", "1"], "did you mean --port"),
    ],
)
def test_mistakes_on_the_command_line_are_named(words, said):
    words = [str(RUNS / "classify") if word == "RUN" else word for word in words]
    with pytest.raises(UserError, match=said):
        main(words)
    assert DemoConfig().host == "127.0.0.1"


def test_a_port_that_is_taken_is_named(server):
    with pytest.raises(UserError, match="cannot listen there"):
        main([str(RUNS / "classify"), "--samples", "0", "--port", str(server.server_address[1])])


def start(*words):
    command = [sys.executable, "-m", "minilora.commands.demo", *map(str, words), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert "answers; Ctrl-C ends it" in line, process.stderr.read()
    return process, int(line.split()[0].rstrip("/").rpartition(":")[2])


def test_sigint_ends_the_program_at_once_during_an_answer_and_another_host_is_warned_of():
    process, port = start(RUNS / "classify", "--samples", "0", "--host", "0.0.0.0")
    Image.new("RGB", (6000, 6000)).save(file := io.BytesIO(), "PNG")  # takes a while to decode, eight of them longer
    head = b"POST /api/answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(file.getvalue())
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(9)]
    for connection in connections[:8]:  # the last one never asks
        connection.sendall(head + file.getvalue())
    connections[0].settimeout(0.3)
    with suppress(TimeoutError):  # until one is answered, or surely asked
        connections[0].recv(1)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - started < 5
    assert errors == "warning: --host 0.0.0.0 is open to others, and there is no password\n"
    replies = [b""] * 8
    for i, connection in enumerate(connections[:8]):
        with suppress(ConnectionError):
            replies[i] = connection.recv(1)
    for connection in connections:
        connection.close()
    assert b"" in replies  # it did not wait for the last


# ---- endurance


def hostile(number, chance):
    """One of many kinds of bytes that a server should survive."""
    head = b"POST /api/answer%s HTTP/1.1\r\nHost: %s\r\n"
    local, length = head % (b"", b"localhost"), b"Content-Length: %d\r\n" % len(png())
    evil = chance.choice(
        (b"evil.example", b"localhost.evil.example", b"localhost@evil.example", b"[::2]", b"\x00", b"")
    )
    up = chance.choice(
        (b"/%2e%2e/%2e%2e/etc/passwd", b"/..%2f..%2fetc/passwd", b"//etc/passwd", b"/%00", b"/\x00", b"*")
    )
    query = chance.choice(
        (b"?\xff\xfe=1", b"?%ff=1", b"?question=%ed%a0%80", b"?" + b"a&" * 9999, b"?run=%2e%2e", b"?\x00")
    )
    strange = chance.choice((b"-1", b"1e9", b"9" * 30, b"x", b"", b"0x10", b"+5", b"5 5"))
    whole = local + length + b"\r\n" + png()
    kinds = (
        bytes(chance.randrange(256) for _ in range(chance.randrange(1, 500))) + b"\r\n\r\n",
        b"GET /" + b"a" * chance.choice((100, 70000)) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/" + chance.choice((b"9.9", b"x", b"1.1.1", b"-1")) + b"\r\n\r\n",
        chance.choice((b"PUT", b"TRACE", b"\x00", b"get", b"OPTIONS")) + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"y" * 70000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: " + evil + b"\r\n\r\n",
        b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % up,
        b"GET http://%s/ HTTP/1.1\r\nHost: localhost\r\n\r\n" % chance.choice((b"localhost", b"evil.example")),
        b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /\r\n\r\n",
        head % (b"", evil) + length + b"\r\n" + png(),
        local + length + b"Origin: http://" + evil + b"\r\n\r\n" + png(),
        local + b"Content-Length: " + strange + b"\r\n\r\n" + png(),
        local + length + length + b"\r\n" + png(),
        local + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n",
        local + b"Expect: 100-continue\r\nContent-Length: 999999999\r\n\r\n",
        head % (query, b"localhost") + length + b"\r\n" + png(),
        whole[: chance.randrange(1, len(whole))],
        local + b"Content-Length: %d\r\n\r\n" % len(bomb()) + bomb(),
        head % (b"?run=vqa&question=%00%01", b"localhost") + b"Content-Length: 4\r\n\r\nGIF8",
        b"",
    )
    return kinds[number % len(kinds)]


def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def converse(server, data):
    """The status of the reply to `data`, after which nothing more is sent; None for a closed connection."""
    with socket.create_connection(server.server_address, timeout=60) as connection:
        with suppress(ConnectionError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        reply = b"".join(iter(lambda: connection.recv(2**16), b""))
    reply = reply.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    if reply:
        assert json.loads(reply.partition(b"\r\n\r\n")[2] or b'{"error": "to HEAD"}')["error"]
        return int(reply.split()[1])


def drip(server, done):
    """A byte at a time, until `done`."""
    while not done.is_set():
        with suppress(OSError), socket.create_connection(server.server_address) as connection:
            for byte in b"POST /api/answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n" + bytes(500):
                if done.wait(0.1):
                    return
                connection.sendall(bytes([byte]))


def endure(server, demos, attacks, questions):
    """Hostile requests, then ordinary ones, both beside slow senders; MiB that the second half of these added."""
    chance, done = random.Random(7), threading.Event()
    slow = [threading.Thread(target=drip, args=(server, done)) for _ in range(10)]
    for thread in slow:
        thread.start()
    silent = [socket.create_connection(server.server_address) for _ in range(20)]
    statuses = [converse(server, hostile(number, chance)) for number in range(attacks)]
    assert not [status for status in statuses if status and not 400 <= status < 500]
    assert sum(status is None for status in statuses) <= 0.1 * attacks  # an empty line, nothing at all
    names, before, memory = list(QUERIES), threading.active_count(), []
    for number in range(questions):
        name, picture = names[number % len(names)], png(number % 5)
        path = ("/api/answer", "/answer")[number % 2]
        status, found = ask(server, picture, path=path, run=name, **QUERIES[name])
        assert status == 200 and found["answers"] == predicted(demos[name].run, picture, **QUERIES[name])
        if number % 50 == 49:
            memory.append(resident())
    assert threading.active_count() <= before + 5
    done.set()
    for connection in silent:
        connection.close()
    for thread in slow:
        thread.join()
    return statuses, memory


def test_hostile_requests_are_refused_and_the_server_goes_on(server, demos, capfd):
    endure(server, demos, 25, 4)
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_200_hostile_requests_and_500_ordinary_ones_leave_no_traceback_and_no_memory(server, demos, capfd):
    statuses, memory = endure(server, demos, 200, 500)
    assert capfd.readouterr().err == ""
    with capfd.disabled():
        print(f"\n{Counter(statuses)}; MiB after each 50 questions: {', '.join(f'{mib:.1f}' for mib in memory)}")
    assert memory[-1] - memory[4] < 20


# ---- the page in a browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium found; apt-get install chromium")
    with Chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def opened(page, demos):
    """The page of some of the demos, at a width; what its console complains of fails the test."""
    servers = []

    def open_page(width, *names):
        server = Server("127.0.0.1", 0, {name: demos[name] for name in names})
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        page.open(server.url, width)
        page.wait(f"document.querySelectorAll('section').length == {len(names)}")
        return page

    page.events.clear()
    yield open_page
    for server in servers:
        server.shutdown()
        server.server_close()
    assert page.complaints() == []


SEEN = """[...document.querySelectorAll('section')].map(section => [section.querySelector('h2').textContent,
  [...section.querySelectorAll('.sides > div')].map(column =>
    [...column.querySelectorAll('.bar')].map(bar => [...bar.children].map(part => part.textContent)))])"""
ANSWERED = "document.getElementById('note').textContent == 'Answered.'"
ASK = "document.querySelector('form button:not([type])').focus()"
SLIDER = "document.querySelector('[type=range]')"
TOO_WIDE = """[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.outerHTML.slice(0, 80))"""


def shown(answers):
    return [[label, "", f"{100 * p:.1f} %"] for label, p in answers]


def expected(run, picture, texts):
    """What SEEN should be: the answers of the run, and those of its base."""
    with disable_lora(run.model):
        base = predicted(run, picture, **texts)
    return [shown(predicted(run, picture, **texts)), shown(base)]


def screenshot(page, name):
    """Into $MINILORA_SCREENSHOTS, if it is set."""
    if folder := os.environ.get("MINILORA_SCREENSHOTS"):
        page.screenshot(os.path.join(folder, f"{name}.png"))


def write_texts(page, texts):
    for key, value in texts.items():
        page.run(f"document.getElementById('{key}').focus()")
        page.type(value if isinstance(value, str) else "\n".join(value))


@pytest.mark.parametrize(("name", "width"), [("classify", 1400), ("vqa", 420), ("choice", 1400), ("names", 420)])
def test_a_picture_is_uploaded_and_asked_about_in_a_browser(opened, demos, name, width, tmp_path):
    run, texts = demos[name].run, QUERIES[name]
    (picture := tmp_path / "picture.png").write_bytes(png(3))
    wanted = expected(run, png(3), texts)
    page = opened(width, name)
    page.choose("#file", picture)
    page.wait("document.getElementById('shown').naturalWidth == 60")
    if "question" in texts:  # the browser says that it is missing
        assert page.run("document.activeElement.id") == "question"
    write_texts(page, texts)
    page.run(ASK)
    page.press("Enter", 13)
    page.wait(f"document.querySelectorAll('.sides > div:first-child .bar').length == {len(wanted[0])}")
    page.wait(ANSWERED)
    assert page.run(SEEN) == [[name, wanted]]
    assert page.run("document.documentElement.scrollWidth <= innerWidth") and page.run(TOO_WIDE) == []
    screenshot(page, f"{name}-{width}")
    page.run("document.querySelector('#samples button').click()")
    page.wait("document.getElementById('shown').naturalWidth != 60")
    page.wait(ANSWERED)


def test_a_picture_is_dropped_and_another_pasted(opened, demos, tmp_path):
    (picture := tmp_path / "größer & gelb.png").write_bytes(png(1))
    page = opened(1400, "classify")
    page.drop(picture, x=900, y=700)  # anywhere
    page.wait(ANSWERED)
    assert page.run(SEEN) == [["classify", expected(demos["classify"].run, png(1), {})]]
    page.copy(png(2))
    page.paste()
    page.wait("document.getElementById('file').files[0].name == 'image.png'")
    page.wait(ANSWERED)
    assert page.run(SEEN) == [["classify", expected(demos["classify"].run, png(2), {})]]


def test_what_is_dropped_but_no_picture_gets_a_sentence(opened, tmp_path):
    (text := tmp_path / "notes.txt").write_text("no picture")
    page = opened(420, "classify")
    page.drop(x=100, y=100)
    page.wait("document.getElementById('note').textContent.startsWith('That is no picture file')")
    page.drop(text, x=100, y=100)
    assert "not a picture of a known format" in page.wait("document.querySelector('.bad')?.textContent")
    page.wait("document.getElementById('note').textContent == document.querySelector('.bad').textContent")
    page.events.clear()  # the console shows the 400


def test_a_question_is_asked_by_keyboard_alone(opened, demos):
    page, order = opened(420, "vqa"), []
    focus = """(e => e.id || e.querySelector('img')?.alt || e.textContent || e.type)(document.activeElement)"""
    for _ in range(6):
        page.press("Tab", 9)
        order.append(page.run(focus))
    samples = [f"sample: {one['title']}" for one in demos["vqa"].about["samples"]]
    assert order == ["file", *samples, "question", "Ask"]
    for _ in range(4):
        page.press("Tab", 9, modifiers=8)  # back to the first sample
    page.press("Enter", 13)
    page.wait(ANSWERED)
    first = demos["vqa"].about["samples"][0]
    body = b64decode(first["image"].partition(",")[2])
    assert page.run(SEEN) == [["vqa", expected(demos["vqa"].run, body, {"question": first["question"]})]]
    for _ in range(3):
        page.press("Tab", 9)
    page.run("document.activeElement.select()")
    page.type("how many?")
    page.press("Enter", 13)  # asks anew about the same picture
    page.wait(ANSWERED)
    assert page.run(SEEN) == [["vqa", expected(demos["vqa"].run, body, {"question": "how many?"})]]


@pytest.mark.parametrize("name", ["classify", "choice"])
def test_the_slider_shows_each_layer_of_the_run_and_of_its_base(opened, server, demos, name, tmp_path):
    first = demos[name].about["samples"][0]
    texts = {key: first[key].split("\n") if key == "choices" else first[key] for key in demos[name].takes}
    body = b64decode(first["image"].partition(",")[2])
    found = ask(server, body, path="/answer", run=name, **texts)[1]
    page = opened(1400, name)
    page.run("document.querySelector('#samples button').click()")
    page.wait(f"{ANSWERED} && !!{SLIDER}")
    page.run(f"{SLIDER}.focus()")
    layers = list(found["attention"])
    assert len(layers) > 1 and len(set(found["attention"].values())) == len(layers)
    for layer in reversed(layers):
        assert page.run(f"{SLIDER}.getAttribute('aria-valuetext')") == layer
        assert page.run(f"{SLIDER}.parentNode.textContent") == f"Attention: {layer}"
        pictures = [found["attention"][layer], found["base"]["attention"][layer]]
        assert page.run("[...document.querySelectorAll('.sides img')].map(img => img.src)") == pictures
        page.press("ArrowLeft", 37)
    page.run("at('note').textContent = ''; document.querySelectorAll('#samples button')[1].click()")
    page.wait(ANSWERED)
    assert page.run(f"{SLIDER}.getAttribute('aria-valuetext')") == layers[0]  # it stays where it was put


@pytest.mark.parametrize("width", [420, 1400])
def test_several_runs_answer_side_by_side_and_an_error_is_shown(opened, demos, width):
    page = opened(width, *QUERIES)
    page.run("document.querySelector('#samples button').click()")  # of classify: nothing else is asked
    page.wait("document.getElementById('question').value == '' && document.activeElement.id == 'question'")
    page.type("what is it?")
    page.press("Enter", 13)
    page.wait("document.activeElement.id == 'choices'")
    page.type("a cat")
    page.run(ASK)
    page.press("Enter", 13)
    page.wait("document.querySelectorAll('.sides').length == 3")
    assert "1 choice; a question needs 2 to 26" in page.wait("document.querySelector('.bad').textContent")
    page.wait("document.getElementById('note').textContent == document.querySelector('.bad').textContent")
    page.events.clear()  # the console shows the 400
    page.run("document.querySelectorAll('#samples button')[6].click()")  # of choice
    page.wait(f"document.querySelectorAll('.sides').length == 4 && {ANSWERED}")
    first = demos["choice"].about["samples"][0]
    body, texts = b64decode(first["image"].partition(",")[2]), {"question": first["question"]}
    texts_of = {"vqa": texts, "choice": texts | {"choices": first["choices"].split("\n")}}
    seen = page.run(SEEN)
    assert seen == [[name, expected(demos[name].run, body, texts_of.get(name, {}))] for name in QUERIES]
    places = page.run(
        "[...document.querySelectorAll('section')].map(s => s.getBoundingClientRect()).map(r => [r.x, r.y])"
    )
    assert (places[0][1] == places[1][1]) == (width == 1400) and (places[0][0] == places[1][0]) == (width == 420)
    assert page.run(TOO_WIDE) == []
    screenshot(page, f"all-{width}")
