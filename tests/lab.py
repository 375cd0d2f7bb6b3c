"""JupyterLab in a headless browser, driven as a person would: for tests/acceptance/test_browser.py."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

# Without the last five, Chromium looks for the network at each start.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(each => each.innerText)"
BEGUN = f"() => {PROMPTS}.some(text => /\\[(\\*|\\d+)\\]:/.test(text))"
DONE = f"() => !{PROMPTS}.some(text => text.includes('*'))"
SOURCES = "cells => cells.map(each => each.querySelector('.cm-content')?.innerText ?? '')"  # none where code is folded
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def jupyter_lab(folder, state):
    """A server on this machine that serves a folder; its address and token. Its settings and log are in ``state``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    settings = state / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    notebooks = state / "settings" / "@jupyterlab" / "notebook-extension"
    notebooks.mkdir()
    (notebooks / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')  # keep cells out of sight
    places = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data"}
    places |= {"JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    command += [f"--ServerApp.root_dir={folder}", "--KernelManager.transport_encryption=auto"]
    environment = os.environ | {name: str(state / place) for name, place in places.items()}
    with open(state / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(240):
                assert server.poll() is None, (state / "lab.log").read_text()
                try:
                    urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=1)
                    break
                except OSError:
                    time.sleep(0.25)
            yield address, token
        finally:
            server.terminate()
            server.wait(30)


class Page:
    """A notebook open in the browser."""

    def __init__(self, page, address, token, name):
        self.page, self.errors = page, []
        page.set_default_timeout(120_000)  # on a busy machine JupyterLab takes its time
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(f"{address}/lab/tree/{name}?token={token}&reset")
        with urllib.request.urlopen(f"{address}/api/contents/{name}?token={token}") as response:
            cells = json.load(response)["content"]["cells"]
        page.wait_for_function(f"() => document.querySelectorAll('.jp-Notebook .jp-Cell').length == {len(cells)}")
        self.sources = [each["source"] for each in cells if each["cell_type"] == "code"]
        self.wait_until_idle(60)

    def wait_until_idle(self, seconds):
        self.page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=1000 * seconds)

    def run_all(self, seconds):
        """Run all cells, and wait until none is running or waiting."""
        from playwright.sync_api import TimeoutError

        for _ in range(3):  # the indicator says idle before the kernel listens: then the click does nothing
            self.page.get_by_role("menuitem", name="Run", exact=True).click()
            self.page.get_by_text("Run All Cells", exact=True).click()
            try:
                self.page.wait_for_function(BEGUN, timeout=8_000)
                break
            except TimeoutError:
                self.page.keyboard.press("Escape")
        self.page.wait_for_function(DONE, timeout=1000 * seconds)
        self.wait_until_idle(seconds)

    def cell(self, text):
        """The one code cell whose source has this text now: it stays that cell when its source changes."""
        cells = self.page.locator(".jp-Notebook .jp-CodeCell")
        shown = cells.evaluate_all(SOURCES)
        sources = [now or before for now, before in zip(shown, self.sources, strict=True)]
        (index,) = [i for i, source in enumerate(sources) if text in source]
        return cells.nth(index)

    def output(self, cell):
        return cell.locator(".jp-Cell-outputWrapper").inner_text()

    def picture(self, cell):
        """The picture that a cell shows, as the address of its bytes."""
        return cell.locator(".jp-Cell-outputWrapper img").first.get_attribute("src")

    def run(self, cell, seconds=120):
        number = cell.locator(".jp-InputPrompt").first.inner_text()
        cell.locator(".cm-content").click()
        self.page.keyboard.press("Control+Enter")
        prompt = cell.locator(".jp-InputPrompt").first
        self.wait_for(lambda: (text := prompt.inner_text()) != number and "*" not in text, seconds)

    def type_and_run(self, cell, source, seconds=120):
        """Replace a cell's source by typing, and run it."""
        cell.locator(".cm-content").click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.insert_text(source)
        self.run(cell, seconds)

    def move_slider(self, cell, key, times):
        cell.locator(".noUi-handle").first.focus()
        for _ in range(times):
            self.page.keyboard.press(key)

    def wait_for(self, condition, seconds):
        for _ in range(4 * seconds):
            if condition():
                return
            self.page.wait_for_timeout(250)
        raise AssertionError("It did not come about in time.")

    def wait_for_output(self, cell, condition, seconds):
        self.wait_for(lambda: condition(self.output(cell)), seconds)

    def hide_files(self):
        """Close the list of files, as one does on a narrow screen."""
        self.page.keyboard.press("Escape")  # from the cell being edited
        self.page.keyboard.press("Control+B")

    def screenshot(self, path, width=1280, height=1600, scroll_to=None):
        self.page.set_viewport_size({"width": width, "height": height})
        if scroll_to is not None:
            scroll_to.scroll_into_view_if_needed()
        self.page.wait_for_timeout(500)
        self.page.screenshot(path=str(path))
