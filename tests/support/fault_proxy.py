"""An HTTP proxy before one server that fails as networks and overloaded stores do, and counts how often it did."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}


class Fault(StrEnum):
    """What a request meets that is picked out."""

    BUSY = "503"
    CUT_UPLOAD = "cut upload"
    """its connection breaks in the midst of its body"""


@dataclass
class Faults:
    """What goes wrong at the moment; may be changed while the proxy runs."""

    share_503: float = 0.0
    """of requests that are answered with 503"""
    share_cut: float = 0.0
    """of answers whose connection breaks in their midst"""
    latency_s: float = 0.0
    dead_until: float = 0.0
    """by time.monotonic: until then every connection is dropped unanswered"""
    pick: Callable[[str], Fault | None] | None = None
    """what meets a request (``PUT /bucket/key?partNumber=1…``); while there is one, requests are answered one by one"""
    seen: Counter[str] = field(default_factory=Counter)
    """requests, how many at once at most, and faults by kind"""

    def die_for(self, seconds: float) -> None:
        self.dead_until = time.monotonic() + seconds

    @property
    def dead(self) -> bool:
        return time.monotonic() < self.dead_until


class FaultProxy:
    """Listens on a free port of the loopback and forwards to another port there."""

    def __init__(self, target_port: int, seed: int = 0) -> None:
        self.faults = Faults()
        self._random = random.Random(seed)
        self._current = 0
        self._counting = threading.Lock()
        self._one_by_one = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(target_port))
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._counting:
            self._current += 1
            self.faults.seen["requests"] += 1
            self.faults.seen["at once"] = max(self.faults.seen["at once"], self._current)
        try:
            yield
        finally:
            with self._counting:
                self._current -= 1

    def _handler(self, target_port: int) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # 40 ms at each answer, else

            def _counted(self) -> None:
                with proxy._counted():
                    self._forward()

            def _forward(self) -> None:
                time.sleep(proxy.faults.latency_s)
                pick = proxy.faults.pick
                with proxy._one_by_one if pick else nullcontext():
                    fault = pick(f"{self.command} {self.path}") if pick else None
                    if proxy.faults.dead:
                        self._drop("dead")
                    elif fault == Fault.CUT_UPLOAD:
                        _half_body(self)
                        self._drop(fault)
                    else:
                        self._answer(fault)

            def _drop(self, why: str) -> None:
                proxy.faults.seen[why] += 1
                self.close_connection = True

            def _answer(self, fault: Fault | None) -> None:
                faults, chance = proxy.faults, proxy._random
                body = _body(self)
                if fault == Fault.BUSY or chance.random() < faults.share_503:
                    faults.seen["503"] += 1
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                status, headers, content = _ask(target_port, self.command, self.path, self.headers, body)
                self.send_response(status)
                for name, value in headers:
                    if name.lower() not in _HOP_BY_HOP:
                        self.send_header(name, value)
                length = {name.lower(): value for name, value in headers}.get("content-length")
                self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(content)))
                self.end_headers()
                if len(content) > 1 and chance.random() < faults.share_cut:
                    self.wfile.write(content[: len(content) // 2])
                    self._drop("cut")
                elif self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _counted

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def _half_body(request: BaseHTTPRequestHandler) -> None:
    """Read half of the body, or of its first chunk, and leave the rest."""
    length = request.headers.get("Content-Length") or request.rfile.readline().split(b";")[0]
    request.rfile.read(int(length, 10 if isinstance(length, str) else 16) // 2)


def _body(request: BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length", 0)))
    parts = []
    while size := int(request.rfile.readline().split(b";")[0], 16):
        parts.append(request.rfile.read(size))
        request.rfile.readline()
    while request.rfile.readline().strip():
        pass
    return b"".join(parts)


def _ask(port: int, method: str, path: str, headers: Any, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        # The signature covers the Host header, so it goes on as it came.
        sent = {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP}
        connection.request(method, path, body, {**sent, "Content-Length": str(len(body))})
        answer = connection.getresponse()
        return answer.status, answer.getheaders(), answer.read()
    finally:
        connection.close()
