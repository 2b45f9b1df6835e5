"""A peer as small as one can be: a thread a request, no batching. `FAKE_FAULT` makes it one that answers wrongly."""

import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cascade

STAGES = cascade.Stages()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        found = STAGES.run_files([self.rfile.read(int(self.headers["Content-Length"]))])[0]
        if isinstance(found, ValueError):
            status, body = 422, b"{}"
        else:
            if os.environ.get("FAKE_FAULT"):
                found["exit"] += 1
            status, body = 200, json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


Server(("127.0.0.1", cascade.PORT), Handler).serve_forever()
