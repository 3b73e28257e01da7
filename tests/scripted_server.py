"""An HTTP server of the OpenAI kind that answers as a test says: real sockets, real errors."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass
class Reply:
    """``hang_s``: silence before the answer. ``drop``: close the connection without one. ``half``: announce twice as
    many bytes as come, and close it."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    hang_s: float = 0.0
    drop: bool = False
    half: bool = False


Script = Callable[[dict[str, Any], int], Reply]  # request body, how many came before


def chat(content: Any, finish_reason: str = "stop") -> Reply:
    text = content if isinstance(content, str) else json.dumps(content)
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return Reply({"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}})


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


class ScriptedServer:
    def __init__(self, script: Script, models: Reply | None = None, port: int = 0) -> None:
        self.script, self.models = script, models or Reply({"data": [{"id": "judge"}]})
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                scripted.keys.append(self.headers.get("Authorization"))
                self._send(scripted.models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with scripted._lock:
                    number = len(scripted.requests)
                    scripted.requests.append(body)
                    scripted.paths.append(self.path)
                    scripted.keys.append(self.headers.get("Authorization"))
                    scripted.under_way += 1
                    scripted.most_under_way = max(scripted.most_under_way, scripted.under_way)
                try:
                    self._send(scripted.script(body, number))
                finally:
                    with scripted._lock:
                        scripted.under_way -= 1

            def _send(self, reply: Reply) -> None:
                time.sleep(reply.hang_s)
                if reply.drop:
                    self.close_connection = True
                    self.connection.close()
                    return
                data = reply.body.encode() if isinstance(reply.body, str) else json.dumps(reply.body).encode()
                try:
                    self.send_response(reply.status)
                    for name, value in {**reply.headers, "Content-Length": str(len(data) * (1 + reply.half))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                    self.close_connection = self.close_connection or reply.half
                except OSError:  # the client gave up
                    self.close_connection = True

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = _Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __exit__(self, *_: object) -> None:
        self.stop()
