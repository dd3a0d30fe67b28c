"""The embedded judge behind HTTP: a small reward model. What it reads: judge_heads.py.

    POST /pooling {"model": "negotiation-judge-...", "messages": [case, (turns,) judged text]}
        -> one thread a connection -> the one worker of Engine -> {"data": [{"data": [3.1]}]}

It answers as vLLM serves reward models, so that a real one can take its place. Left out: every
other endpoint.

    python judge_server.py --port 8000
    python judge_server.py fit                 # fit its heads anew, when the labels have changed
"""

import dataclasses
import http.server
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from cli import UserError, command_line, option, run_cli
from client import Missing, dig
from judge_heads import Base, apply, fit, heads_digest, load_heads
from reward import EMBEDDED


class Refusal(Exception):
    """A request that is answered with an error: status, message."""


class Engine:
    """The base, its heads, and the one worker that reads for all connections."""

    def __init__(self):
        self.name = f"{EMBEDDED}-{heads_digest()}"
        reads, self.heads = load_heads()
        self.base = Base(reads)
        threads = max(1, torch.get_num_threads() // 2)  # playing needs the others
        self.worker = ThreadPoolExecutor(1, "judge", torch.set_num_threads, [threads])

    def ask(self, head, before, text):
        """The number that a head gives, waiting for its turn."""
        return self.worker.submit(self.read, head, before, text).result()

    def read(self, head, before, text):
        """On the worker: the head's number, a score from 0 to 5, an agreement as it is."""
        value = apply(self.heads[head], self.base.features(head, before, text)).item()
        return value if head == "agreed" else min(5.0, max(0.0, value))


class Handler(http.server.BaseHTTPRequestHandler):
    """GET /v1/models and POST /pooling, around `self.server.engine`."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    disable_nagle_algorithm = True

    def log_message(self, *args):
        """Nothing is logged."""

    def do_GET(self):
        if self.path.rstrip("/") != "/v1/models":
            return self.send(404, "unknown path")
        engine = self.server.engine
        others = [f"{engine.name}:{head}" for head in engine.heads if head != "score"]
        models = [{"id": name, "object": "model"} for name in [engine.name, *others]]
        self.send(200, {"object": "list", "data": models})

    def do_POST(self):
        """The number that was asked for, or the reason why there is none."""
        engine = self.server.engine
        try:
            value = engine.ask(*self.question())
        except Refusal as refusal:
            return self.send(*refusal.args)
        except (RuntimeError, MemoryError) as error:  # this one fails, the server lives
            return self.send(500, str(error)[:200])
        found = [{"index": 0, "object": "pooling", "data": [value]}]
        self.send(200, {"object": "list", "model": engine.name, "data": found})

    def question(self):
        """(head, texts before the judged one, judged text) of a request. Raises Refusal."""
        engine = self.server.engine
        try:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path.rstrip("/") != "/pooling":
                raise Refusal(404, "unknown path; this server has /pooling")
            body = json.loads(data)
            messages = dig(body, "messages", kind=list)
            *before, judged = [dig(message, "content", kind=str) for message in messages]
            " ".join([*before, judged]).encode()  # no tokenizer takes half a surrogate pair
        except (ValueError, RecursionError, Missing):
            form = '{"messages": [{"role": ..., "content": TEXT}, ...]}, without half a character'
            raise Refusal(400, f"the body must be JSON like {form}") from None
        model = str(body.get("model", engine.name))
        head = model.removeprefix(engine.name).removeprefix(":") or "score"
        if head not in engine.heads:
            raise Refusal(404, f"the model {model[:80]} is not served here; {engine.name} is")
        return head, before or [""], judged

    def send(self, status, content):
        """Reply with JSON, an error in the OpenAI shape."""
        if status != 200:
            content = {"error": {"message": content, "code": status}}
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(http.server.ThreadingHTTPServer):
    """One thread per connection; all of them wait for the one worker of `engine`."""

    request_queue_size = 128
    engine = None

    def handle_error(self, request, client_address):
        """Whoever asked has gone: the connection ends without a word. A fault of ours is shown."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


@dataclasses.dataclass(frozen=True)
class ServeSettings:
    """Serve the embedded judge."""

    port: int = option(8000, "port of 127.0.0.1 (0: a free one)", low=0, high=65535)
    until_eof: bool = option(False, "end when standard input ends: with the parent, that is")


def end_with_parent():
    """Wait for standard input to end, then end this process."""
    os.read(0, 1)
    os._exit(0)


def main():
    """`fit`, or serve until Ctrl-C or the end of standard input."""
    if sys.argv[1:] == ["fit"]:
        return fit()
    settings = command_line(ServeSettings, prog="judge_server.py")
    if settings.until_eof:
        threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        server = Server(("127.0.0.1", settings.port), Handler)
    except OSError as error:
        raise UserError(f"--port {settings.port}: {error.strerror}; choose another") from error
    try:
        server.engine = Engine()
    except torch.OutOfMemoryError as error:
        advice = "start CUDA_VISIBLE_DEVICES= python judge_server.py, and name it by --judge-url"
        raise UserError(f"embedded judge: the last card is full; {advice}") from error
    url = f"http://127.0.0.1:{server.server_port}/v1"
    print(f"serving {server.engine.name} at {url}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    run_cli(main)
