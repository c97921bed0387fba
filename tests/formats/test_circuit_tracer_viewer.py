"""circuit-tracer's viewer opens our graphs, in Chromium. ``make test-viewer`` installs its page (``.venv-viewer``)."""

from __future__ import annotations

import functools
import http.server
import re
import threading
import time
from pathlib import Path

import pytest

from tests.analysis.test_graph_result import by_hand
from tests.campaigns.browser import Browser, chromium
from tl_vpd.formats import to_circuit_tracer

VIEWER = Path(__file__).parents[2] / ".venv-viewer"
ASSETS, MODULES = VIEWER / "circuit_tracer/frontend/assets", VIEWER / "node_modules"
JETPACK = "d3-jetpack/build/d3-jetpack.cjs"
LIBRARIES = (
    "d3-collection/dist/d3-collection.min.js",
    "d3/dist/d3.min.js",
    JETPACK,
    "dagre/dist/dagre.min.js",
    "pako/dist/pako.min.js",
)
"""What the page takes from the network."""
WRAPPED = """(() => {{ const exports = {{}}, module = {{exports}}, require = () => d3; {}
const conventions = exports.conventions;
Object.assign(d3, exports, {{conventions: c => {{
  c = conventions(c); c.drawAxis = svg => d3.drawAxis({{...c, svg}}); return c; }}}}); }})()"""
"""A module of Node that adds to d3, as a script; with a method that the page's copy of it has."""

pytestmark = pytest.mark.skipif(
    chromium() is None or not ASSETS.is_dir(), reason="needs Chromium and circuit-tracer's page (make test-viewer)"
)


class Handler(http.server.SimpleHTTPRequestHandler):
    """The page with its libraries from the disk, and graphs where circuit-tracer's server has them."""

    def __init__(self, *args, graphs, **kwargs):
        self.graphs = graphs
        super().__init__(*args, directory=str(ASSETS), **kwargs)

    def do_GET(self):
        path = self.path.split("?")[0]
        if path == "/":
            text = re.sub(r"<script src='https://[^>]*></script>\n", "", (ASSETS / "index.html").read_text())
            scripts = "".join(f"<script src='/{name}'></script>" for name in LIBRARIES)
            self._put(text.replace("<script", scripts + "<script", 1).encode(), "text/html")
        elif path.startswith(("/data/", "/graph_data/")):
            self._put((self.graphs / path.rpartition("/")[2]).read_bytes(), "application/json")
        elif path[1:] in LIBRARIES:
            text = (MODULES / path[1:]).read_text()
            self._put((WRAPPED.format(text) if path[1:] == JETPACK else text).encode(), "text/javascript")
        else:
            super().do_GET()

    def _put(self, content, kind):
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def address(tmp_path):
    to_circuit_tracer(by_hand(), tmp_path, slug="hand", scan="toy")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, graphs=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def wait_for(browser, code):
    """The value of an expression once it is true."""
    end = time.monotonic() + 60
    while not (value := browser.evaluate(code)):
        assert time.monotonic() < end, code
        time.sleep(0.2)
    return value


def texts(browser, selector):
    """The text of every element."""
    return browser.evaluate(f"[...document.querySelectorAll({selector!r})].map(e => e.textContent)")


def test_the_viewer_draws_our_graph_and_names_its_subcomponents(address):
    browser = Browser()
    try:
        browser.send("Page.navigate", url=f"{address}?slug=hand&clickedId=3_3_1")
        wait_for(browser, "document.querySelectorAll('.link-graph text.node').length == 6")
        wait_for(browser, "document.querySelectorAll('.node-connections .feature-row').length")
        assert texts(browser, "select.graph-prompt-select option") == ["toy — a</b>"]
        assert 'Output "x" (p=0.500)' in texts(browser, ".node-connections")[0]
        assert any("blocks.0.mlp.W_out:0" in row for row in texts(browser, ".node-connections .feature-row"))
        browser.send("Page.navigate", url=f"{address}?slug=hand&clickedId=1_9_1")
        wait_for(browser, "document.querySelector('.node-connections')?.textContent.includes('blocks.0.mlp.W_in:9')")
        # What goes into W_in:9, and where it goes, with the weights of the graph by hand.
        rows = wait_for(
            browser, "[...document.querySelectorAll('.node-connections .feature-row')].map(e => e.textContent)"
        )
        weights = {re.search(r"blocks\S*:\d|Emb", row)[0]: row[-6:].replace("−", "-") for row in rows}
        assert {name: float(weight) for name, weight in weights.items()} == {
            "Emb": 2, "blocks.0.attn.W_O:4": -2, "blocks.0.mlp.W_out:0": 1.5,
        }  # fmt: skip
        thrown = [str(event) for event in browser.events if event["method"] == "Runtime.exceptionThrown"]
        assert all("Failed to fetch" in text for text in thrown), thrown  # examples of a feature, on the Hub
    finally:
        browser.close()
