"""The search server that :mod:`benchmarks.adapters` starts, in a process of its own.

``python -m benchmarks.adapter_server SECONDS one-at-a-time|in-parallel`` prints its address. It
answers every query with the same passages, in the formats of Search-R1 and of GEM, and a GET with
the requests and queries that it has counted.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

TEXT = ("The company was founded in the spring of 1912 by a clockmaker and his sister. " * 8)[:600]
DOCUMENT = {"id": "p", "title": "Company", "text": TEXT, "contents": f'"Company"\n{TEXT}'}
FOUND = [{"document": DOCUMENT, "score": 1.0}] * 3


def make_server(seconds: float, *, parallel: bool) -> ThreadingHTTPServer:
    """A server on a free port.

    Args:
        seconds: how long each request takes, whatever its number of queries.
        parallel: whether requests of the same moment are answered at the same time.
    """
    engine: Any = nullcontext() if parallel else threading.Lock()
    lock = threading.Lock()
    counts = {"requests": 0, "queries": 0}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self.reply(json.dumps(counts).encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            packed = not body.startswith(b"{")
            asked = msgspec.msgpack.decode(body) if packed else json.loads(body)
            number = len(asked.get("queries", [""]))
            with lock:
                counts["requests"] += 1
                counts["queries"] += number
            with engine:
                time.sleep(seconds)
            if packed:
                self.reply(msgspec.msgpack.encode({"result": FOUND}))
            else:
                self.reply(json.dumps({"result": [FOUND] * number}).encode())

        def reply(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    return Listener(("127.0.0.1", 0), Handler)


def main(words: list[str]) -> None:
    """Serve until the process is ended."""
    server = make_server(float(words[0]), parallel=words[1] == "in-parallel")
    print(f"http://127.0.0.1:{server.server_address[1]}/retrieve", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
