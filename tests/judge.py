"""An OpenAI-compatible server on this machine whose judge is a function."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-a-key-that-nobody-may-see"
Answer = tuple[int, str]


class Server:
    """An OpenAI-compatible server whose judge is a function: (answer A, answer B, request number) -> status, reply."""

    def __init__(self, replies: Callable[[str, str, int], Answer]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.replies = replies
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.times.append(time.monotonic())
                server.requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
                status, text = server.replies(*answers_in(body), len(server.requests))
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("retry-after-ms", "10")
                reply = json.dumps(completion(text) if status == 200 else {"error": {"message": f"{text} {KEY}"}})
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply.encode())

            def log_message(self, *_: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"


def completion(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


def answers_in(body: dict[str, Any]) -> tuple[str, str]:
    text = body["messages"][1]["content"]
    first, second = (text.split(f"<answer-{name}>\n")[1].split(f"\n</answer-{name}>")[0] for name in "ab")
    return first, second


def longer(first: str, second: str, number: int) -> Answer:
    verdict = "C" if len(first) == len(second) else "A" if len(first) > len(second) else "B"
    return 200, f"[[A]] and [[B]] are what I may say. My verdict: [[{verdict}]]"
