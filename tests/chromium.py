"""Headless Chromium through chromedriver's own HTTP interface (W3C WebDriver), for tests of pages."""

import base64
import contextlib
import shutil
import subprocess
import time

import requests

BACKSPACE = "\ue003"


class Browser:
    """with Browser() as browser: browser.open(url); browser.type("3"); browser.run("return 1")"""

    available = bool(shutil.which("chromium") and shutil.which("chromedriver"))

    def __enter__(self):
        self._process = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        line = next(line for line in self._process.stdout if "started successfully on port" in line)
        self._at = f"http://127.0.0.1:{int(line.split()[-1].rstrip('.'))}/session"
        self._session = ""
        arguments = ["--headless=new", "--no-sandbox", "--window-size=1100,800", "--disable-gpu"]
        chrome = {"binary": shutil.which("chromium"), "args": arguments}
        asked = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": chrome}}}
        self._session = "/" + self._post("", asked)["sessionId"]
        return self

    def __exit__(self, *exception):
        with contextlib.suppress(requests.RequestException):
            requests.delete(self._at + self._session, timeout=10)
        self._process.terminate()
        self._process.wait()
        self._process.stdout.close()

    def _post(self, path: str, body: dict):
        reply = requests.post(self._at + self._session + path, json=body, timeout=60).json()["value"]
        if isinstance(reply, dict) and "error" in reply:
            raise RuntimeError(reply["message"])
        return reply

    def open(self, url: str) -> None:
        self._post("/url", {"url": url})

    def run(self, script: str):
        """The value of a script's `return`."""
        return self._post("/execute/sync", {"script": script, "args": []})

    def wait_for(self, condition: str, seconds: float = 10) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.02)

    def type(self, *keys: str) -> None:
        """Real key presses, to whatever has the focus."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._post("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def scheme(self, scheme: str) -> None:
        """ "dark" or "light", as the user prefers."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        command = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}}
        self._post("/goog/cdp/execute", command)

    def screenshot(self) -> bytes:
        """PNG."""
        return base64.b64decode(
            requests.get(self._at + self._session + "/screenshot", timeout=60).json()["value"]
        )
