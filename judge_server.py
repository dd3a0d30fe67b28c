"""The embedded judge: a small reward model behind HTTP, and how its heads were fitted.

    (case, judged text) -> frozen base, hidden states after LAYER blocks, mean over the judged text (H,)
                        -> a linear head each: score, endorse, agreed   data/judge_heads.safetensors
    data/judge_labels.jsonl, agreement_labels.jsonl -> the same features -> ridge regression     fit

It answers where vLLM serves reward models, so that a real one can take its place: POST /pooling
{"model": "negotiation-judge-...", "messages": [case, judged text]} -> {"data": [{"data": [3.1]}]}.
One thread per connection, one worker for the model. Each text is read by itself: so a score depends
on nothing but the text, and a row of some 300 tokens keeps a CPU as busy as a batch does.

    python judge_server.py --port 8000      # serve
    python judge_server.py fit              # refit the heads, and print how good they are
"""

import concurrent.futures
import dataclasses
import hashlib
import http.server
import itertools
import json
import os
import queue
import sys
import threading

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

import data_gen
from cli import UserError, command_line, option, run_cli
from data_gen import DATA
from model import compute_dtype, default_model_folder, packed
from reward import EMBEDDED, Case, case_of, clean, for_reward_model, spoken
from selfplay import Turn

HEADS = DATA / "judge_heads.safetensors"
LAYER = 22  # blocks of the base that are computed
# Chosen, as LAYER was, by cross-validation over the dilemmas that are not the test's: the ridge
# penalty, and how many hand-made texts a text of a policy counts for.
RIDGE = {"score": (10000.0, 8.0), "endorse": (10000.0, 8.0), "agreed": (1000.0, 1.0)}
LONGEST_REQUEST, WAITING = 1 << 20, 64  # bytes; requests that may wait
LONGEST_TEXT = 1000  # tokens of a case, and of a judged text; of more, the last ones are read
USABLE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
CORES = max(1, USABLE // 2)  # that it computes on


class Refuse(Exception):
    """A request that is answered with an error: status, message."""


def heads_digest():
    """8 hex digits of the shipped heads: part of the judge's name, so that another one's answers are never taken for its own.

    Raises UserError when they are not there.
    """
    try:
        return hashlib.sha256(HEADS.read_bytes()).hexdigest()[:8]
    except OSError as error:
        raise UserError(
            f"{HEADS}: cannot be read ({error.strerror}); put it back, or name a --judge-url"
        )


class Base:
    """The frozen model, cut off after LAYER blocks."""

    def __init__(self):
        folder = default_model_folder()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=compute_dtype("auto")).eval()
        self.model.layers = self.model.layers[:LAYER]
        self.model.norm = nn.Identity()

    def ids(self, text):
        """Ids of untrusted text, in which no control token can be spelled."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ][-LONGEST_TEXT:]

    @torch.no_grad()
    def features(self, case, text):
        """Mean hidden state over the judged text after its case, (H,) fp32."""
        before, judged = self.ids(case + "\n\n"), self.ids(text) or self.ids("(nothing)")
        hidden = self.model(
            input_ids=torch.tensor([before + judged]), use_cache=False
        ).last_hidden_state  # (1, T, H)
        return hidden[0, len(before) :].float().mean(0)


# ---- fitting -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Example:
    """A label: what is read, and what a head should say."""

    scenario: str
    test: bool  # of the dilemmas that are only looked at once a version
    source: str
    before: str
    judged: str
    value: float


def examples():
    """{head: [Example]} of the shipped labels."""
    dilemmas = {s.id: s.dilemma for s in data_gen.load_scenarios()}
    found = {"score": [], "endorse": [], "agreed": []}

    def add(head, row, personas, texts, value):
        case = Case(case_of(dilemmas[row["scenario_id"]], personas), texts, {})
        read = for_reward_model(head, case)
        found[head].append(
            Example(row["scenario_id"], row["split"] == "test", row.get("source", ""), *read, value)
        )

    for n, row in enumerate(data_gen.load_jsonl(DATA / "judge_labels.jsonl")):
        texts = {"solution": clean(row["solution"])}
        add("score", row, row["personas"], texts, row["score"])
        seat = n % 2  # one party of each: enough, and half the time
        add("endorse", row, [row["personas"][seat]], texts, row["endorse"][seat])
    for row in data_gen.load_jsonl(DATA / "agreement_labels.jsonl"):
        turns = [Turn(i % 2, text, False) for i, text in enumerate(row["turns"])]
        add(
            "agreed",
            row,
            row["personas"],
            {"dialogue": spoken(row["personas"], turns)},
            float(row["agreed"]),
        )
    return found


def ridge(features, values, counts, penalty):
    """Weights (H + 1,), the constant last, of features (n, H) that are standardised on the way.

    They minimise sum_i counts_i (x_i w - y_i)^2 + penalty |w|^2.
    """
    share = counts / counts.sum()
    mean, scale, middle = share @ features, features.std(0) + 1e-6, share @ values
    x, y = (features - mean) / scale, values - middle
    square = x.T @ (counts[:, None] * x) + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    w = torch.linalg.solve(square, x.T @ (counts * y)) / scale
    return torch.cat([w, (middle - mean @ w)[None]])


def ranks(values):
    """Ranks from 1; equal values share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(one, other):
    """Spearman's rank correlation; NaN where one side is constant."""
    return np.corrcoef(ranks(one), ranks(other))[0, 1]


def pairs_right(given, labels, scenarios):
    """Of pairs on one scenario whose labels differ by half a point or more: how often the better one is given more."""
    right = [
        (given[a] - given[b]) * (labels[a] - labels[b]) > 0
        for a, b in itertools.combinations(range(len(given)), 2)
        if scenarios[a] == scenarios[b] and abs(labels[a] - labels[b]) >= 0.5
    ]
    return sum(right) / max(1, len(right)), len(right)


def fit():
    """Fit each head on the dilemmas that are not the test's, write them, and print how good they are on the others."""
    base, heads = Base(), {}
    for head, rows in examples().items():
        read = [base.features(row.before, row.judged) for row in tqdm(rows, desc=head)]
        features, values = (
            torch.stack(read).double(),
            torch.tensor([row.value for row in rows]).double(),
        )
        test = torch.tensor([row.test for row in rows])
        policy = [row.source.startswith(("warm", "trained", "policy")) for row in rows]
        penalty, share = RIDGE[head]
        counts = torch.tensor([share if p else 1.0 for p in policy]).double()
        weights = ridge(features[~test], values[~test], counts[~test], penalty)
        given = features @ weights[:-1] + weights[-1]
        heads[head] = weights.float()
        spoken_by = torch.tensor(policy)
        parts = {"fitted on": ~test, "test": test, "test, policies'": test & spoken_by}
        for part, which in parts.items():
            at = which.nonzero()[:, 0].tolist()
            labels = [rows[i].value for i in at]
            said = [given[i].item() for i in at]
            if head == "agreed":
                share = sum(
                    (x > 0.5) == (y > 0.5) for x, y in zip(said, labels, strict=True)
                ) / len(at)
                print(f"{head:8} {part:16} {share:.2f} right of {len(at)}")
            else:
                share, n = pairs_right(said, labels, [rows[i].scenario for i in at])
                print(
                    f"{head:8} {part:16} {share:.2f} of {n} pairs right, Spearman {spearman(said, labels):.2f}"
                )
    save_file(heads, HEADS)
    print(f"{HEADS}: the heads")
    return 0


# ---- serving -------------------------------------------------------------------------------------


class Engine:
    """The base, its heads, and the one worker that reads for all connections."""

    def __init__(self, threads):
        self.name, self.base, self.threads = f"{EMBEDDED}-{heads_digest()}", Base(), threads
        try:
            self.heads = {
                name: head.float() for name, head in load_file(HEADS).items()
            }  # (H + 1,) weights, then the constant
        except SafetensorError as error:
            raise UserError(
                f"{HEADS}: cannot be read ({error}); put it back, or run python judge_server.py fit"
            )
        self.queue = queue.Queue(WAITING)
        threading.Thread(target=self._work, daemon=True).start()

    def ask(self, head, case, text):
        """The number that a head gives, waiting for it. Raises Refuse."""
        future = concurrent.futures.Future()
        try:
            self.queue.put_nowait((head, case, text, future))
        except queue.Full:
            raise Refuse(429, "too many requests are waiting; come back in a second") from None
        return future.result()

    def _work(self):
        torch.set_num_threads(self.threads)
        with packed(self.base.model):
            while True:
                head, case, text, future = self.queue.get()
                try:
                    row, weights = self.base.features(case, text), self.heads[head]
                    value = float(row @ weights[:-1] + weights[-1])
                    future.set_result(value if head == "agreed" else min(5.0, max(0.0, value)))
                except (RuntimeError, MemoryError) as error:  # this one fails, the server lives
                    future.set_exception(Refuse(500, str(error)[:200]))


class Handler(http.server.BaseHTTPRequestHandler):
    """GET /v1/models and POST /pooling, around `self.server.engine`."""

    protocol_version, timeout, disable_nagle_algorithm = "HTTP/1.1", 60, True

    def log_message(self, *args):
        """Nothing is logged."""

    def do_GET(self):
        engine = self.server.engine
        names = [
            engine.name,
            *(f"{engine.name}:{head}" for head in engine.heads if head != "score"),
        ]
        listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}
        known = self.path.rstrip("/") == "/v1/models"
        self.send(200, listed) if known else self.send(404, "unknown path")

    def do_POST(self):
        size = self.headers.get("Content-Length", "")
        if not size.isdigit() or int(size) > LONGEST_REQUEST:
            self.close_connection = True
            status = 413 if size.isdigit() else 411
            return self.send(status, f"a Content-Length of at most {LONGEST_REQUEST} is needed")
        try:
            engine = self.server.engine
            value = engine.ask(*self.question(self.rfile.read(int(size))))
            found = [{"index": 0, "object": "pooling", "data": [value]}]
            self.send(200, {"object": "list", "model": engine.name, "data": found})
        except Refuse as refusal:
            self.send(*refusal.args)

    def question(self, data):
        """(head, case, judged text) of a request's body. Raises Refuse."""
        name = self.server.engine.name
        if self.path.rstrip("/") != "/pooling":
            raise Refuse(404, "unknown path; this server has /pooling")
        try:
            body = json.loads(data)
            json.dumps(
                body, ensure_ascii=False
            ).encode()  # no tokenizer takes half a surrogate pair
        except (ValueError, RecursionError):
            raise Refuse(400, "the body is not JSON, or holds half a character") from None
        messages = body.get("messages") if isinstance(body, dict) else None
        if not isinstance(messages, list) or not messages:
            raise Refuse(400, "messages must be a list of {role, content}")
        texts = [m.get("content") if isinstance(m, dict) else None for m in messages]
        if not all(isinstance(text, str) for text in texts):
            raise Refuse(400, "each message must have a text as its content")
        head = str(body.get("model", name)).removeprefix(name).removeprefix(":") or "score"
        if head not in self.server.engine.heads:
            raise Refuse(404, f"the model {str(body['model'])[:80]} is not served here; {name} is")
        return head, "\n".join(texts[:-1]), texts[-1]

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

    request_queue_size, engine = 128, None

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


def serve(argv):
    """Serve until Ctrl-C, or until standard input ends."""
    settings = command_line(ServeSettings, argv, "judge_server.py")
    if settings.until_eof:
        threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
    try:
        server = Server((settings.host, settings.port), Handler)
    except OSError as error:
        raise UserError(
            f"--port {settings.port}: cannot listen on {settings.host} ({error.strerror}); choose another"
        )
    server.engine = Engine(settings.threads or CORES)
    print(
        f"serving {server.engine.name} at http://{settings.host}:{server.server_address[1]}/v1",
        flush=True,
    )
    server.serve_forever()


if __name__ == "__main__":
    run_cli(lambda: fit() if sys.argv[1:] == ["fit"] else serve(sys.argv[1:]))
