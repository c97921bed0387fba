"""An OpenAI-compatible endpoint on this machine: it answers as a test says, and notes what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-secret-0123456789"
Reply = tuple[int, dict[str, str], bytes]


def text_reply(text: Any, *, usage: tuple[int, int] | None = (100, 10)) -> Reply:
    """A good reply with this text."""
    body: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
    if usage:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return 200, {}, json.dumps(body).encode()


def label_reply(text: str) -> Reply:
    """A good reply with a label."""
    return text_reply(json.dumps({"label": text}))


def status(code: int, message: str = "a fault of the test", **headers: str) -> Reply:
    """A refusal; ``Retry_After`` is the header Retry-After."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return code, named, json.dumps({"error": {"message": message}}).encode()


class Server(ThreadingHTTPServer):
    """The server.

    Attributes:
        replies: what the n-th request gets, or a function from (n, body) to it; the last of a list goes on.
        bodies: of all requests.
        times: at which they came.
        cut: bytes of each answer that are sent before the connection ends (None: all).
        pause: seconds between two bytes (None: all at once).
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: list[Reply] | Callable[[int, dict[str, Any]], Reply] = [label_reply("a label")]
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: list[str | None] = []
        self.cut: int | None = None
        self.pause: float | None = None
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        """The endpoint's address."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self.server.bodies.append({"method": "GET", "path": self.path})
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server._lock:
            n = len(server.bodies)
            server.bodies.append({**body, "path": self.path})
            server.times.append(time.monotonic())
            server.keys.append(self.headers.get("Authorization"))
            server._now += 1
            server.most_at_once = max(server.most_at_once, server._now)
        code, headers, content = (
            server.replies(n, body) if callable(server.replies) else server.replies[min(n, len(server.replies) - 1)]
        )
        with server._lock:  # before the answer goes out, after which the next question may come
            server._now -= 1
        self.send_response(code)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        sent = content if server.cut is None else content[: server.cut]
        for i in range(len(sent) if server.pause else 1):
            self.wfile.write(sent[i : i + 1] if server.pause else sent)
            self.wfile.flush()
            time.sleep(server.pause or 0)
