"""Servers on the loopback: one that answers as a test tells it, for shards that are not files, and what all share."""

from __future__ import annotations

import contextlib
import http.server
import threading
import time
from collections import Counter
from collections.abc import Callable

from bcosify.data.remote import Patience

QUICK = Patience(silence=0.4, tries=3, pause=0.01)
Handler = http.server.BaseHTTPRequestHandler
Answer = Callable[[Handler, int], None]


class Listening:
    """A server on a free port of the loopback; requests are answered by `handler` in threads."""

    def __init__(self, handler: type[Handler]):
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


class Server(Listening):
    """Loopback server: `answers[path](handler, how many requests for this path came before)`."""

    def __init__(self):
        self.answers: dict[str, Answer] = {}
        self.asked: Counter[str] = Counter()
        self.ranges: list[str | None] = []
        lock, server = threading.Lock(), self

        class Answering(Handler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with lock:
                    before = server.asked[self.path]
                    server.asked[self.path] += 1
                    server.ranges.append(self.headers.get("Range"))
                self.close_connection = True
                with contextlib.suppress(OSError):  # who asked has gone
                    server.answers.get(self.path, status(404))(self, before)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(Answering)


def whole(body: bytes, tag: str | None = '"1"', length: int | None = None) -> Answer:
    """`body`, or its end where a range is asked for. `length`: what is announced in place of the truth."""

    def answer(handler: Handler, before: int) -> None:
        asked, start = handler.headers.get("Range"), 0
        if asked and handler.headers.get("If-Range") == tag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body) - start if length is None else length))
        if tag:
            handler.send_header("ETag", tag)
        handler.end_headers()
        handler.wfile.write(body[start:])

    return answer


def status(code: int, **headers: str) -> Answer:
    def answer(handler: Handler, before: int) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def cut(body: bytes, at: int, tag: str | None = '"1"') -> Answer:
    """Announces all of `body`, sends so many bytes, and hangs up."""
    return whole(body[:at], tag, len(body))


def first(*answers: Answer) -> Answer:
    """One after the other; the last one for ever."""
    return lambda handler, before: answers[min(before, len(answers) - 1)](handler, before)


def silent(handler: Handler, before: int) -> None:
    time.sleep(1)
