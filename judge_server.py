"""The embedded judge: a small reward model behind HTTP. How it was fitted: judge_fit.py.

    (case, judged text) -> frozen base -> hidden states, averaged over the judged text (F,)
                        -> a linear head each: score, endorse, agreed   data/judge_heads.safetensors

It answers as vLLM serves reward models, so that a real one can take its place: POST /pooling
{"model": "negotiation-judge-...", "messages": [case, judged text]} -> {"data": [{"data": [3.1]}]}.
Each text is read by itself, so its score depends on nothing else. Left out: batches (a text of
some 300 tokens keeps a CPU as busy), every other endpoint.

    python judge_server.py --port 8000
"""

import concurrent.futures
import dataclasses
import hashlib
import http.server
import json
import os
import sys
import threading

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoTokenizer

from cli import UserError, command_line, option, run_cli
from client import Missing, dig
from dataset import DATA
from model import compute_dtype, default_model_folder
from reward import EMBEDDED

HEADS = DATA / "judge_heads.safetensors"
LONGEST_REQUEST = 1 << 20  # bytes
LONGEST_TEXT = 1000  # tokens of a case, and of a judged text; of more, the last ones are read
WAITING = 64  # requests that may wait
USABLE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2


class Refusal(Exception):
    """A request that is answered with an error: status, message."""


def heads_digest():
    """8 hex digits of the heads, part of the judge's name: other heads' answers never pass for its.

    Raises UserError when they are not there.
    """
    try:
        return hashlib.sha256(HEADS.read_bytes()).hexdigest()[:8]
    except OSError as error:
        problem = f"{HEADS}: cannot be read ({error.strerror})"
        raise UserError(f"{problem}; put it back, or name a --judge-url") from error


def place():
    """Where the base reads: on the last card, without any on the CPU.

    A turn waits for the judge's word, and one judge serves the dialogues of all ranks: a CPU, which
    feeds the cards besides, would keep them waiting. The last card is one that no rank uses, or
    that of the rank with the least to do: rank 0 starts this server, and writes the run's folder.
    """
    cards = torch.cuda.device_count()
    return torch.device("cuda", cards - 1) if cards else torch.device("cpu")


class Base:
    """The frozen model, cut off after the last layer that a head reads.

    reads: {head: [(layer, tokens of the judged text from its beginning; None: all of them)]}.
    """

    def __init__(self, reads):
        self.reads = reads
        folder = default_model_folder()
        self.device = place()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        dtype = compute_dtype("auto", self.device)
        self.model = AutoModel.from_pretrained(folder, dtype=dtype).eval().to(self.device)
        last = max(layer for parts in reads.values() for layer, _ in parts)
        self.model.layers = self.model.layers[:last]
        self.model.norm = nn.Identity()

    def ids(self, text):
        """Ids of untrusted text, in which no control token can be spelled."""
        plain = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return plain["input_ids"][-LONGEST_TEXT:]

    @torch.no_grad()
    def features(self, head, case, text):
        """What `head` reads of a text after its case: mean hidden states in a row, (F,) fp32."""
        before = self.ids(case + "\n\n")
        judged = self.ids(text) or self.ids("(nothing)")
        ids = torch.tensor([before + judged], device=self.device)  # (1, T)
        states = self.model(ids, use_cache=False, output_hidden_states=True).hidden_states
        means = []
        for layer, tokens in self.reads[head]:
            read = states[layer][0, len(before) :][:tokens]  # (tokens read, H)
            means.append(read.float().mean(0))
        return torch.cat(means).cpu()


def apply(weights, features):
    """What a head says of features (..., F): a number each, (...,)."""
    return features @ weights[:-1] + weights[-1]


def load_heads():
    """({head: what it reads}, {head: weights (F + 1,)}). Raises UserError for a damaged file."""
    try:
        with safe_open(HEADS, "pt") as file:
            reads = json.loads(file.metadata()["reads"])
        heads = {name: head.float() for name, head in load_file(HEADS).items()}
    except SafetensorError as error:
        problem = f"{HEADS}: cannot be read ({error})"
        raise UserError(f"{problem}; put it back, or run python judge_fit.py") from error
    return reads, heads


class Engine:
    """The base, its heads, and the one worker that reads for all connections."""

    def __init__(self, threads=0):
        self.name = f"{EMBEDDED}-{heads_digest()}"
        reads, self.heads = load_heads()
        self.base = Base(reads)
        self.worker = concurrent.futures.ThreadPoolExecutor(
            1, "judge", torch.set_num_threads, [threads or max(1, USABLE // 2)]
        )
        self.places = threading.BoundedSemaphore(WAITING)

    def ask(self, head, case, text):
        """The number that a head gives, waiting for its turn. Raises Refusal."""
        if not self.places.acquire(blocking=False):
            raise Refusal(429, "too many requests are waiting; come back in a second")
        try:
            return self.worker.submit(self.read, head, case, text).result()
        except (RuntimeError, MemoryError) as error:  # this one fails, the server lives
            raise Refusal(500, str(error)[:200]) from error
        finally:
            self.places.release()

    def read(self, head, case, text):
        """On the worker: the head's number, a score from 0 to 5, an agreement as it is."""
        value = apply(self.heads[head], self.base.features(head, case, text)).item()
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
        size = self.headers.get("Content-Length", "")
        if not size.isdigit() or int(size) > LONGEST_REQUEST:
            self.close_connection = True
            return self.send(413, f"a Content-Length of at most {LONGEST_REQUEST} is needed")
        engine = self.server.engine
        try:
            value = engine.ask(*self.question(self.rfile.read(int(size))))
        except Refusal as refusal:
            return self.send(*refusal.args)
        found = [{"index": 0, "object": "pooling", "data": [value]}]
        self.send(200, {"object": "list", "model": engine.name, "data": found})

    def question(self, data):
        """(head, case, judged text) of a request's body. Raises Refusal."""
        engine = self.server.engine
        if self.path.rstrip("/") != "/pooling":
            raise Refusal(404, "unknown path; this server has /pooling")
        try:
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
        return head, "\n".join(before), judged

    def send(self, status, content):
        """Reply with JSON, an error in the OpenAI shape."""
        if status != 200:
            kind = "server_error" if status >= 500 else "invalid_request_error"
            content = {"error": {"message": content, "type": kind, "param": None, "code": status}}
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "1")
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

    port: int = option(8000, "port (0: a free one)", low=0, high=65535)
    host: str = option("127.0.0.1", "address; anything but loopback lets others in")
    threads: int = option(0, "CPU threads (0: half of the cores)", low=0)
    until_eof: bool = option(False, "end when standard input ends: with the parent, that is")


def end_with_parent():
    """Wait for standard input to end, then end this process."""
    os.read(0, 1)
    os._exit(0)


def main():
    """Serve until Ctrl-C, or until standard input ends."""
    settings = command_line(ServeSettings, prog="judge_server.py")
    if settings.until_eof:
        threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        server = Server((settings.host, settings.port), Handler)
    except OSError as error:
        problem = f"--port {settings.port}: cannot listen on {settings.host} ({error.strerror})"
        raise UserError(f"{problem}; choose another") from error
    try:
        server.engine = Engine(settings.threads)
    except torch.OutOfMemoryError as error:
        advice = "start this file by itself with CUDA_VISIBLE_DEVICES= and name it by --judge-url"
        raise UserError(f"embedded judge: the last card is full; {advice}") from error
    url = f"http://{settings.host}:{server.server_address[1]}/v1"
    print(f"serving {server.engine.name} at {url}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    run_cli(main)
