"""An HTTP port of the driver at which an agent of the cloud tells that a machine will be taken away.

``POST /notice`` with ``{"node": "<address, host name or Ray node id>", "seconds": 30}`` and the header
``Authorization: Bearer <token>``; the token comes from the environment, never from the configuration.
"""

from __future__ import annotations

import hmac
import json
import os
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from data_shards.errors import BadInput
from trainer.stop_signal import MOST_SECONDS

TOKEN = "BATON_NOTICE_TOKEN"
_MOST_BYTES = 4096

Tell = Callable[[str, float | None], bool]
"""Of a node's name and the seconds left; returns whether there is such a node."""


class NoticeServer:
    def __init__(self, port: int, tell: Tell) -> None:
        """Raises BadInput where the token is missing or the port is taken."""
        token = os.environ.get(TOKEN, "")
        if not token:
            raise BadInput(
                f"cluster.notice_port={port} needs a token in the environment variable {TOKEN}, which whoever gives "
                "notice sends as `Authorization: Bearer …`"
            )
        try:
            self._server = ThreadingHTTPServer(("0.0.0.0", port), _handler(token, tell))
        except OSError as error:
            raise BadInput(
                f"cluster.notice_port={port}: {error.strerror}; choose another one, or 0 for none"
            ) from error
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="notices", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(token: str, tell: Tell) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_POST(self) -> None:
            given = self.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                self._answer(401, "a notice needs the header Authorization: Bearer <token>")
            elif self.path != "/notice":
                self._answer(404, "notices go to /notice")
            else:
                self._take()

        def _take(self) -> None:
            try:
                length = int(self.headers.get("Content-Length", "0"))
                if not 0 <= length <= _MOST_BYTES:
                    raise ValueError(f"a body of {length} bytes")
                value = json.loads(self.rfile.read(length))
                node, seconds = value["node"], value.get("seconds")
                left = None if seconds is None else float(seconds)
                if left is not None and not 0 <= left <= MOST_SECONDS:
                    raise ValueError(f"{left} seconds")
            except (ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
                self._answer(400, f'expected {{"node": "…", "seconds": 30}} ({error})')
                return
            if tell(str(node), left):
                self._answer(202, "noted")
            else:
                self._answer(404, f"the cluster has no node {node!r}")

        def _answer(self, status: int, text: str) -> None:
            body = f"{text}\n".encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: what counts is in the run's events."""

    return Handler
