"""The embedded judge: a small reward model behind HTTP, and how its heads were fitted.

    (case, judged text) -> frozen base -> hidden states, averaged over the judged text (F,)
                        -> a linear head each: score, endorse, agreed   data/judge_heads.safetensors
    data/judge_labels.jsonl, agreement_labels.jsonl -> the same features -> ridge regression     fit

It answers as vLLM serves reward models, so that a real one can take its place: POST /pooling
{"model": "negotiation-judge-...", "messages": [case, judged text]} -> {"data": [{"data": [3.1]}]}.
Each text is read by itself, so its score depends on nothing else. Left out: batches (a text of
some 300 tokens keeps a CPU as busy), every other endpoint.

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
import re
import sys
import threading

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

import dataset
from chat import Turn
from cli import UserError, command_line, option, run_cli
from dataset import DATA
from model import compute_dtype, default_model_folder
from reward import EMBEDDED
from rubric import Case, case_of, clean, for_reward_model, spoken

HEADS = DATA / "judge_heads.safetensors"
# What a head reads: (layer, tokens of the judged text from its beginning; None: all of them).
# Chosen by cross-validation over the dilemmas that are not the test's, as are the two numbers of
# RIDGE: the penalty, and how many hand-made texts one text of a policy counts for.
READS = {"score": [(22, None)], "endorse": [(22, None)], "agreed": [(20, 12)]}
RIDGE = {"score": (10000.0, 8.0), "endorse": (10000.0, 8.0), "agreed": (3000.0, 1.0)}
POLICIES = ("warm", "trained", "policy")  # sources of labels: texts that a policy wrote
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
    """The frozen model, cut off after the last layer that a head reads."""

    def __init__(self):
        folder = default_model_folder()
        self.device = place()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        dtype = compute_dtype("auto", self.device)
        self.model = AutoModel.from_pretrained(folder, dtype=dtype).eval().to(self.device)
        last = max(layer for reads in READS.values() for layer, _ in reads)
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
        for layer, tokens in READS[head]:
            read = states[layer][0, len(before) :][:tokens]  # (tokens read, H)
            means.append(read.float().mean(0))
        return torch.cat(means).cpu()


# ---- fitting -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Example:
    """A label: what is read, and what a head should say."""

    scenario: str
    test: bool  # of the dilemmas that are only looked at once a version
    source: str  # who wrote it: a policy (warm, trained, policy), or bare, hand, demo
    before: str
    judged: str
    value: float


def examples():
    """{head: [Example]} of the shipped labels."""
    dilemmas = {scenario.id: scenario.dilemma for scenario in dataset.load_scenarios()}
    found = {head: [] for head in READS}

    def add(head, row, personas, texts, value):
        case = Case(case_of(dilemmas[row["scenario_id"]], personas), texts, {})
        before, judged = for_reward_model(head, case)
        source = re.split(r"[ -]", row["source"])[0]
        test = row["split"] == "test"
        found[head].append(Example(row["scenario_id"], test, source, before, judged, value))

    for number, row in enumerate(dataset.load_jsonl(DATA / "judge_labels.jsonl")):
        texts = {"solution": clean(row["solution"])}
        add("score", row, row["personas"], texts, row["score"])
        seat = number % 2  # one party of each: enough, and half the time
        add("endorse", row, [row["personas"][seat]], texts, row["endorse"][seat])
    for row in dataset.load_jsonl(DATA / "agreement_labels.jsonl"):
        turns = [Turn(i % 2, text, False) for i, text in enumerate(row["turns"])]
        texts = {"dialogue": spoken(row["personas"], turns)}
        add("agreed", row, row["personas"], texts, float(row["agreed"]))
    return found


def ridge(features, values, counts, penalty):
    """Weights (F + 1,), the constant last, of features (N, F) that are standardised on the way.

    They minimise sum_i counts_i (x_i w - y_i)^2 + penalty |w|^2.
    """
    share = counts / counts.sum()
    mean, middle = share @ features, share @ values
    scale = features.std(0) + 1e-6
    x, y = (features - mean) / scale, values - middle
    square = x.T @ (counts[:, None] * x) + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(square, x.T @ (counts * y)) / scale
    return torch.cat([weights, (middle - mean @ weights)[None]])


def apply(weights, features):
    """What a head says of features (..., F): a number each, (...,)."""
    return features @ weights[:-1] + weights[-1]


def spearman(a, b):
    """Rank correlation of two equally long rows of numbers; equal numbers share their mean rank."""
    ranks = []
    for values in (np.asarray(a), np.asarray(b)):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    return float(np.corrcoef(*ranks)[0, 1])


def pairs_right(given, rows):
    """(share, number) of pairs on one scenario, labels half a point or more apart, put right."""
    right = []
    for (said, row), (other_said, other) in itertools.combinations(zip(given, rows), 2):
        apart = row.value - other.value
        if row.scenario == other.scenario and abs(apart) >= 0.5:
            right.append((said - other_said) * apart > 0)
    return sum(right) / max(1, len(right)), len(right)


def quality(head, given, rows):
    """How good the head's numbers for these Examples are, in words."""
    labels = [row.value for row in rows]
    if head == "agreed":
        right = sum((said > 0.5) == (label > 0.5) for said, label in zip(given, labels))
        return f"{right / len(rows):.2f} right of {len(rows)}"
    share, pairs = pairs_right(given, rows)
    return f"{share:.2f} of {pairs} pairs right, Spearman {spearman(given, labels):.2f}"


def show_quality(head, given, rows):
    """Print how good the head is on what it was fitted on, on the test's, and on each policy's."""
    parts = {
        "fitted on": [not row.test for row in rows],
        "test": [row.test for row in rows],
        **{f"test, {name}": [row.test and row.source == name for row in rows] for name in POLICIES},
    }
    for part, inside in parts.items():
        if any(inside):
            chosen = list(itertools.compress(rows, inside))
            said = list(itertools.compress(given, inside))
            print(f"{head:8} {part:14} {quality(head, said, chosen)}")


def fit():
    """Fit each head on the dilemmas that are not the test's, write it, print how good it is."""
    base, heads = Base(), {}
    for head, rows in examples().items():
        read = [base.features(head, row.before, row.judged) for row in tqdm(rows, desc=head)]
        features = torch.stack(read).double()  # (N, F)
        values = torch.tensor([row.value for row in rows]).double()
        penalty, weight = RIDGE[head]
        counts = torch.tensor([weight if row.source in POLICIES else 1.0 for row in rows]).double()
        fitted_on = torch.tensor([not row.test for row in rows])
        weights = ridge(features[fitted_on], values[fitted_on], counts[fitted_on], penalty)
        heads[head] = weights.float()
        show_quality(head, apply(weights, features).tolist(), rows)
    save_file(heads, HEADS, metadata={"reads": json.dumps(READS)})
    print(f"{HEADS}: the heads")
    return 0


# ---- serving -------------------------------------------------------------------------------------


def load_heads():
    """{head: weights (F + 1,)}. Raises UserError for a file that is damaged, or of other READS."""
    try:
        with safe_open(HEADS, "pt") as file:
            reads = (file.metadata() or {}).get("reads")
        heads = {name: head.float() for name, head in load_file(HEADS).items()}
    except SafetensorError as error:
        problem = f"{HEADS}: cannot be read ({error})"
        raise UserError(f"{problem}; put it back, or run python judge_server.py fit") from error
    if reads != json.dumps(READS):
        problem = f"{HEADS}: fitted to other features than judge_server.py reads"
        raise UserError(f"{problem}; run python judge_server.py fit")
    return heads


class Engine:
    """The base, its heads, and the one worker that reads for all connections."""

    def __init__(self, threads=0):
        self.name, self.base = f"{EMBEDDED}-{heads_digest()}", Base()
        self.heads = load_heads()
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
            status = 413 if size.isdigit() else 411
            return self.send(status, f"a Content-Length of at most {LONGEST_REQUEST} is needed")
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
            # No tokenizer takes half a surrogate pair.
            json.dumps(body, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            raise Refusal(400, "the body is not JSON, or holds half a character") from None
        messages = body.get("messages") if isinstance(body, dict) else None
        if not isinstance(messages, list) or not messages:
            raise Refusal(400, "messages must be a list of {role, content}")
        texts = [m.get("content") if isinstance(m, dict) else None for m in messages]
        if not all(isinstance(text, str) for text in texts):
            raise Refusal(400, "each message must have a text as its content")
        model = str(body.get("model", engine.name))
        head = model.removeprefix(engine.name).removeprefix(":") or "score"
        if head not in engine.heads:
            raise Refusal(404, f"the model {model[:80]} is not served here; {engine.name} is")
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


def serve(argv):
    """Serve until Ctrl-C, or until standard input ends."""
    settings = command_line(ServeSettings, argv, "judge_server.py")
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


def main():
    """`fit`, or else serve."""
    return fit() if sys.argv[1:] == ["fit"] else serve(sys.argv[1:])


if __name__ == "__main__":
    run_cli(main)
