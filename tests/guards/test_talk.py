"""The page in which SmolLM2 answers: what is served, and in a browser the answers of the package's own model.

The browser's part needs wllama, playwright and Chromium: LORA_LAB_WLLAMA names the folder ``node_modules``.

    npm install --prefix somewhere @wllama/wllama@3.13.0
    LORA_LAB_WLLAMA=somewhere/node_modules python -m pytest -q tests/guards/test_talk.py
"""

import os
import threading
import urllib.request
from contextlib import contextmanager

import pytest

import lora_lab as ll
from lora_lab.course import talk
from tests import lab

MODULES = os.environ.get("LORA_LAB_WLLAMA")
PROMPT = "Make up a story about a cat on the stairs."


@contextmanager
def served(folder):
    """The address of a folder that is served."""
    with talk.make_server(folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_threads_may_share_memory_and_the_wasm_is_said_to_be_one(tmp_path):
    (tmp_path / "wllama.wasm").write_bytes(b"\0asm")
    with served(tmp_path) as address, urllib.request.urlopen(f"{address}/wllama.wasm") as answer:
        assert answer.read() == b"\0asm"
        assert answer.headers["Content-Type"] == "application/wasm"
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"


def test_without_wllama_it_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"npm install .*{talk.PACKAGE}"):
        talk.gather(tmp_path, tmp_path)


@pytest.mark.skipif(not MODULES, reason="LORA_LAB_WLLAMA names no folder with wllama")
def test_the_dial_is_the_packages(tmp_path, smollm2):
    from playwright.sync_api import sync_playwright

    model, tokenizer = smollm2
    ll.load_adapter(model, ll.adapters.shipped("lighthouse-keeper"))
    expected = {}
    for scale in (0, 1):
        with ll.adapters.strength(model, float(scale)):
            greedy = {"max_new_tokens": 12, "temperature": 0, "repetition_penalty": 1.0}
            expected[scale] = ll.reply(model, tokenizer, PROMPT, **greedy)
    talk.gather(MODULES, tmp_path)
    with served(tmp_path) as address, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=lab.CHROMIUM, args=lab.FLAGS)
        page = browser.new_page()
        page.goto(address)
        page.wait_for_function("!document.querySelector('#ask').disabled", timeout=300_000)
        said = {}
        for scale in (1, 0, 0.5):
            page.locator("#dial").fill(str(scale))
            page.click("#ask")
            page.wait_for_function("!document.querySelector('#ask').disabled", timeout=300_000)
            said[scale] = page.locator("#answers article").first.inner_text().partition(": ")[2]
        browser.close()
    # Greedy answers agree until rounding decides between two tokens: llama.cpp multiplies in 8 bits.
    for scale, text in expected.items():
        assert said[scale].split()[:5] == text.split()[:5]
    assert len(set(said.values())) == 3
