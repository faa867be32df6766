"""Headless Chromium over --remote-debugging-pipe: json that ends in a zero byte, on descriptors 3 and 4."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
)


class Chromium:
    """One page of a browser of its own; `with Chromium(folder) as page`."""

    def __init__(self, profile: Path, seconds: float = 60):
        self.profile, self.seconds = profile, seconds
        self.numbers, self.left, self.events = itertools.count(1), b"", []

    def __enter__(self):
        (theirs_in, self.to), (self.back, theirs_out) = os.pipe(), os.pipe()
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, *FLAGS.split(), f"--user-data-dir={self.profile}"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "DOM", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *exc):
        os.close(self.to)  # the browser ends with its pipe
        os.close(self.back)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def call(self, method, **params):
        """The result of one command; what the browser says meanwhile is kept in `events`."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + self.seconds
        while True:
            one, zero, rest = self.left.partition(b"\0")
            if not zero:
                assert select.select([self.back], [], [], max(0, end - time.monotonic()))[0], f"{method}: no answer"
                chunk = os.read(self.back, 2**20)
                assert chunk, f"{method}: the browser has ended"
                self.left += chunk
                continue
            self.left, reply = rest, json.loads(one)
            if reply.get("id") == number:
                assert "error" not in reply, reply
                return reply["result"]
            self.events.append(reply)

    def run(self, script):
        """The value of a script, waited for where it is a promise."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script):
        """Until a script is true."""
        end = time.monotonic() + self.seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)
        return value

    def open(self, url, width):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        self.call("Page.navigate", url=url)
        self.wait("document.readyState == 'complete'")

    def choose(self, selector, file):
        """Give a file to an <input type=file>."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def press(self, key, code, **more):
        for kind in ("rawKeyDown", "char", "keyUp"):
            text = {"text": "\r"} if kind == "char" and key == "Enter" else {}
            if kind != "char" or text:
                extra = text | (more if kind == "rawKeyDown" else {})
                self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **extra)

    def drop(self, *files, x=200, y=200):
        """Drag files from outside over a point of the page, and let them fall."""
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def copy(self, png):
        """Put a picture on the clipboard."""
        self.browser("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        self.call("Page.bringToFront")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        text = base64.b64encode(png).decode()
        blob = f"fetch('data:image/png;base64,{text}').then(reply => reply.blob())"
        self.run(f"{blob}.then(blob => navigator.clipboard.write([new ClipboardItem({{'image/png': blob}})]))")

    def paste(self):
        self.press("v", 86, modifiers=2, commands=["paste"])

    def browser(self, method, **params):
        """A command to the browser rather than to the page."""
        session, self.session = self.session, None
        try:
            return self.call(method, **params)
        finally:
            self.session = session

    def type(self, text):
        self.call("Input.insertText", text=text)

    def screenshot(self, path):
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def complaints(self):
        """What the page's console says of errors."""
        said = [event["params"] for event in self.events if event.get("method") in ("Runtime.exceptionThrown",)]
        logged = [event["params"]["entry"] for event in self.events if event.get("method") == "Log.entryAdded"]
        return said + [entry for entry in logged if entry["level"] == "error"]
