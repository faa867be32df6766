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
from urllib.parse import urlencode

import pytest
import torch
from PIL import Image

from minilora.commands import demo_server
from minilora.commands.demo import Demo, DemoConfig, main
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
    torch.manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8).numpy()
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
    server = demo_server.Server("127.0.0.1", 0, demos)
    threading.Thread(target=server.serve_forever, daemon=True).start()
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
    if "classes" in texts:
        labels = run.labels
        run.name_classes(texts.pop("classes"))
        try:
            return predicted(run, body)
        finally:
            run.name_classes(labels)
    (answers,) = run.predict([Image.open(io.BytesIO(body))], **texts)
    return [list(pair) for pair in answers]


# ---- answers


@pytest.mark.parametrize("name", QUERIES)
def test_an_answer_is_that_of_predict_and_base_is_that_of_disable_lora(server, demos, name):
    run = demos[name].run
    status, found = ask(server, png(), run=name, base=1, **QUERIES[name])
    assert status == 200 and found["run"] == name
    assert found["answers"] == predicted(run, png(), **QUERIES[name])
    assert found["milliseconds"] > 0 and "attention" not in found
    with disable_lora(run.model):
        assert found["base"]["answers"] == predicted(run, png(), **QUERIES[name])
    assert found["base"]["answers"] != found["answers"]


def test_named_classes_are_for_one_question_and_the_runs_own_come_back(server, demos):
    own = predicted(demos["names"].run, png())
    assert {label for label, _ in ask(server, png(), run="names", classes=["x y", "z"])[1]["answers"]} == {"x y", "z"}
    assert ask(server, png(), run="names")[1]["answers"] == own


@pytest.mark.parametrize("name", QUERIES)
def test_attention_has_a_picture_for_every_layer_with_and_without_lora(server, demos, name):
    found = ask(server, png(), run=name, base=1, attention=1, **QUERIES[name])[1]
    model = demos[name].run.model
    depth = len(getattr(model, "vision", model).blocks)
    assert list(found["attention"]) == [*(f"layer {n}" for n in range(1, depth + 1)), "rollout"]
    assert found["base"]["attention"].keys() == found["attention"].keys()
    for uri in found["attention"].values():
        assert Image.open(io.BytesIO(b64decode(uri.partition(",")[2]))).size == (224, 224)
    assert found["base"]["attention"]["rollout"] != found["attention"]["rollout"]


def test_the_first_run_answers_where_none_is_named(server):
    assert ask(server, png())[1] | {"milliseconds": 0} == ask(server, png(), run="classify")[1] | {"milliseconds": 0}


def test_samples_are_pictures_of_the_runs_data_that_can_be_asked_about(server):
    about = {one["name"]: one for one in ask(server, path="/api/runs", method="GET")[1]}
    assert about.keys() == QUERIES.keys()
    assert "/" not in "".join(one["about"] for one in about.values())  # no folder is named
    for name, one in about.items():
        assert len(one["samples"]) == 3
        texts = {key: one["samples"][0][key] for key in one["takes"] if key != "classes"}
        assert ask(server, b64decode(one["samples"][0]["image"].partition(",")[2]), run=name, **texts)[0] == 200


def test_several_at_once_are_answered_one_after_the_other(server, demos):
    expected = {seed: predicted(demos["classify"].run, png(seed)) for seed in range(8)}
    found = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: ask(server, png(seed), base=1)[1]["answers"]}))
        for seed in expected
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


# ---- refusals


@pytest.mark.parametrize(
    ("status", "words", "body", "query"),
    [
        (415, "not a picture of a known format", b"%PDF-1.4", {}),
        (415, "not a picture of a known format", b"<svg xmlns='http://www.w3.org/2000/svg'/>", {}),
        (415, "cannot be decoded", png()[:200], {}),
        (415, "more than 89,478,485 pixels", bomb(), {}),
        (400, "ends after 0 bytes", b"", {}),
        (413, "at most 20,971,520", bytes(20 * 2**20 + 1), {}),
        (400, "question is missing", png(), {"run": "vqa"}),
        (400, "question is missing", png(), {"run": "vqa", "question": "  "}),
        (400, "more than once", png(), {"run": "vqa", "question": ["a", "b"]}),
        (413, "4,001 characters", png(), {"run": "vqa", "question": "x" * 4001}),
        (400, "choices is missing", png(), {"run": "choice", "question": "what?"}),
        (400, "1 choice; a question needs 2 to 26", png(), {"run": "choice", "question": "a", "choices": "b"}),
        (400, "choice B is empty", png(), {"run": "choice", "question": "a", "choices": ["b", ""]}),
        (400, "question is not for classify", png(), {"question": "what?"}),
        (400, "no name to make a sentence of", png(), {"run": "names", "classes": ["a", " "]}),
        (400, "make the same sentence", png(), {"run": "names", "classes": ["a b", "a_b"]}),
        (400, "image is not for classify", png(), {"image": "/etc/passwd"}),
        (400, "run is given once, and is one of classify", png(), {"run": "../classify"}),
        (400, "base is given once, and is one of 0, 1", png(), {"base": "yes"}),
    ],
)
def test_what_cannot_be_answered_gets_a_sentence(server, status, words, body, query):
    found = ask(server, body, **query)
    assert found[0] == status and list(found[1]) == ["error"]
    assert words in found[1]["error"] and "\n" not in found[1]["error"]


@pytest.mark.parametrize("path", ["/etc/passwd", "/../../etc/passwd", "//etc/passwd", "/%2e%2e/x", "/api/runs/"])
def test_no_path_leads_to_a_file(server, path):
    status, found = ask(server, path=path, method="GET")
    assert status == 404 and found["error"].startswith("no such address")


def test_each_address_has_one_method_and_a_picture_needs_its_length(server):
    assert ask(server, method="GET") == (405, {"error": "/api/answer is asked with POST"})
    assert ask(server, path="/")[0] == ask(server, path="/", method="DELETE")[0] == 405
    assert b" 411 " in raw(server, b"POST /api/answer HTTP/1.1\r\nHost: localhost\r\n\r\n").split(b"\r\n")[0]
    assert b" 405 " in raw(server, b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n").split(b"\r\n")[0]


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Host": "127.0.0.1.evil.example:80"}, {"Host": "[x"}])
def test_a_foreign_name_for_this_machine_is_refused(server, headers):
    for path, method in (("/", "GET"), ("/api/runs", "GET"), ("/api/answer", "POST")):
        assert ask(server, png(), path=path, method=method, headers=headers)[0] == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://{host}"])
def test_a_foreign_page_cannot_ask(server, origin):
    host = "{}:{}".format(*server.server_address)
    status, found = ask(server, png(), headers={"Origin": origin.format(host=host)})
    assert (status, found["error"]) == (403, "a page from elsewhere may not ask this server")
    assert ask(server, png(), headers={"Origin": f"http://{host}"})[0] == 200


def test_only_a_server_for_others_takes_any_number_as_its_name(demos):
    server = demo_server.Server("0.0.0.0", 0, demos)
    threading.Thread(target=server.serve_forever, daemon=True).start()
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


def test_a_request_that_does_not_come_in_time_is_given_up(server, monkeypatch, capfd):
    monkeypatch.setattr(demo_server, "SECONDS", 1)
    head = b"POST /api/answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    assert b"did not come within 1 seconds" in raw(server, head + b"x")
    with socket.create_connection(server.server_address, timeout=30) as slow:
        started = time.monotonic()
        with pytest.raises(OSError):  # one byte at a time does not keep the connection
            while time.monotonic() < started + 20:
                slow.sendall(b"G")
                time.sleep(0.1)
        assert time.monotonic() - started < 15
    assert capfd.readouterr().err == ""


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
    assert not demo.about["lora"] and demo.about["samples"] == []
    assert (
        demo.answer(io.BytesIO(png()), {}, False, False)["answers"]
        == demo.run.predict([Image.open(io.BytesIO(png()))])[0]
    )
    with pytest.raises(UserError, match="no LoRA to switch off"):
        demo.answer(io.BytesIO(png()), {}, True, False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a run directory"),
        (["nowhere"], "no such run directory"),
        (["RUN", "RUN"], "named twice"),
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


def test_sigint_ends_the_program_at_once_and_another_host_is_warned_of():
    process, port = start(RUNS / "classify", "--samples", "0", "--host", "0.0.0.0")
    with socket.create_connection(("127.0.0.1", port)):  # one that never asks
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - started < 5
    assert errors == "warning: --host 0.0.0.0: whoever reaches this machine can ask; there is no password\n"


# ---- endurance


def hostile(number, chance):
    """One of many kinds of bytes that a server should survive."""
    head = b"POST /api/answer%s HTTP/1.1\r\nHost: localhost\r\n"
    kinds = (
        lambda: bytes(chance.randrange(256) for _ in range(chance.randrange(1, 500))) + b"\r\n\r\n",
        lambda: b"GET /" + b"a" * chance.choice((100, 70000)) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        lambda: b"GET / HTTP/" + chance.choice((b"9.9", b"x", b"1.1.1", b"-1")) + b"\r\n\r\n",
        lambda: chance.choice((b"PUT", b"TRACE", b"\x00", b"get")) + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        lambda: b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        lambda: b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        lambda: b"GET /\r\n\r\n",
        lambda: head % b"" + b"Content-Length: " + chance.choice((b"-1", b"1e9", b"9" * 30, b"x", b"")) + b"\r\n\r\n",
        lambda: head % b"" + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        lambda: head % b"" + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n",
        lambda: (
            head % chance.choice((b"?\xff\xfe=1", b"?%ff=1", b"?question=%ed%a0%80", b"?" + b"a&" * 9999)) + b"\r\n"
        ),
        lambda: head % b"" + b"Content-Length: 500\r\n\r\n" + png()[: chance.randrange(499)],
        lambda: head % b"" + b"Content-Length: %d\r\n\r\n" % len(bomb()) + bomb(),
        lambda: head % b"?run=vqa&question=%00%01" + b"Content-Length: 4\r\n\r\nGIF8",
        lambda: b"",
    )
    return kinds[number % len(kinds)]()


def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def converse(server, data):
    """The status of the reply to `data`, after which nothing more is sent; None for a closed connection."""
    with socket.create_connection(server.server_address, timeout=60) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            reply = b"".join(iter(lambda: connection.recv(2**16), b""))
        except ConnectionError:
            return None
    return int(reply.split()[1]) if reply else None


def endure(server, demos, attacks, questions, monkeypatch):
    """Hostile requests, among them slow senders, then ordinary ones; MiB that the second half of these added."""
    monkeypatch.setattr(demo_server, "SECONDS", 3)
    chance = random.Random(7)
    slow = [socket.create_connection(server.server_address) for _ in range(10)]
    for connection in slow:
        connection.sendall(b"POST /api/answer HTTP/1.1\r\nHost: localhost\r\nContent-Le")
    statuses = [converse(server, hostile(number, chance)) for number in range(attacks)]
    assert not [status for status in statuses if status and not 400 <= status < 500]
    assert sum(status is not None for status in statuses) > 0.8 * attacks
    for connection in slow:
        connection.close()
    monkeypatch.setattr(demo_server, "SECONDS", 60)
    names, half = list(QUERIES), 0.0
    for number in range(questions):
        if number == questions // 2:
            half = resident()
        name = names[number % len(names)]
        status, found = ask(server, png(number % 5), run=name, base=1, attention=number % 2, **QUERIES[name])
        assert status == 200 and found["answers"] == predicted(demos[name].run, png(number % 5), **QUERIES[name])
    return resident() - half


def test_hostile_requests_are_refused_and_the_server_goes_on(server, demos, monkeypatch, capfd):
    endure(server, demos, 30, 4, monkeypatch)
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_200_hostile_requests_and_500_ordinary_ones_leave_no_traceback_and_no_memory(server, demos, monkeypatch, capfd):
    grown = endure(server, demos, 200, 500, monkeypatch)
    print(f"\n{grown:.1f} MiB more after the last 250 questions")
    assert grown < 20
    assert capfd.readouterr().err == ""


# ---- the page in a browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium found; apt-get install chromium")
    with Chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


SEEN = """[...document.querySelectorAll('section')].map(section => [section.querySelector('h2').textContent,
  [...section.querySelectorAll('.two > div')].map(column =>
    [...column.querySelectorAll('.bar')].map(bar => [...bar.children].map(part => part.textContent)))])"""


def shown(answers):
    return [[label, "", f"{100 * p:.1f} %"] for label, p in answers]


@pytest.mark.parametrize(("name", "width"), [("classify", 1400), ("vqa", 420), ("choice", 1400), ("names", 420)])
def test_a_picture_is_uploaded_and_asked_about_in_a_browser(page, demos, name, width, tmp_path):
    """The answers on the page are those of predict; screenshots go to $MINILORA_SCREENSHOTS if it is set."""
    server, run, texts = demo_server.Server("127.0.0.1", 0, {name: demos[name]}), demos[name].run, QUERIES[name]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (picture := tmp_path / "picture.png").write_bytes(png(3))
    wanted = predicted(run, png(3), **texts)  # before the server's thread uses the model
    with disable_lora(run.model):
        base = predicted(run, png(3), **texts)
    page.events.clear()
    try:
        page.open(server.url, width)
        page.wait("document.querySelectorAll('section').length == 1")
        page.choose("#file", picture)
        page.wait("document.getElementById('shown').naturalWidth == 60")
        for key, value in texts.items():
            page.run(f"document.getElementById('{key}').focus()")
            page.type(value if isinstance(value, str) else "\n".join(value))
        page.run("document.querySelector('form button:not([type])').focus()")
        page.press("Enter", 13)
        page.wait(f"document.querySelectorAll('.two > div:first-child .bar').length == {len(wanted)}")
        page.wait("document.getElementById('note').textContent == 'Answered.'")
        ((title, columns),) = page.run(SEEN)
        assert title == name and columns == [shown(wanted), shown(base)]
        slider = "document.querySelector('[type=range]')"
        assert page.run(f"{slider}.getAttribute('aria-valuetext')") == "rollout"
        before = page.run("document.querySelector('.two img').src")
        page.run(f"{slider}.focus()")
        page.press("ArrowLeft", 37)
        assert page.run(f"{slider}.getAttribute('aria-valuetext')").startswith("layer ")
        if name != "names":  # that model has one layer, which the rollout looks like
            assert page.run("document.querySelector('.two img').src") != before
        assert page.run("document.documentElement.scrollWidth <= innerWidth")  # nothing to the right of the screen
        page.run("document.querySelector('#samples button').click()")
        page.wait("document.getElementById('shown').naturalWidth != 60")
        page.wait("document.getElementById('note').textContent == 'Answered.'")
        if folder := os.environ.get("MINILORA_SCREENSHOTS"):
            page.screenshot(os.path.join(folder, f"{name}-{width}.png"))
        assert page.complaints() == []
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("width", [420, 1400])
def test_several_runs_answer_side_by_side_and_an_error_is_shown(page, server, width):
    page.open(server.url, width)
    page.wait("document.querySelectorAll('section').length == 4")
    page.run("document.querySelector('#samples button').click()")  # of classify: nothing else is asked
    page.wait("document.getElementById('question').value == '' && document.activeElement.id == 'question'")
    page.type("what is it?")
    page.press("Enter", 13)
    page.wait("document.querySelectorAll('.two').length == 3")
    assert page.wait("document.querySelector('.bad').textContent").startswith("choices is missing")
    page.run("document.querySelectorAll('#samples button')[6].click()")  # of choice
    page.wait("document.querySelectorAll('.two').length == 4")
    page.wait("document.getElementById('note').textContent == 'Answered.'")
    if folder := os.environ.get("MINILORA_SCREENSHOTS"):
        page.screenshot(os.path.join(folder, f"all-{width}.png"))
