"""Servers for tests, on loopback: a judge with a rule that everybody can read, and all its faults.

    with JudgeServer(lambda text: 5 * ("together" in text)) as server:
        judge = reward.Judge(settings, server.url)

`offers` says what it has: "expect" (top log-probs), "json"; "pooling", "classify" (as vLLM has
them), "sglang" (its /classify). `faults` is a list with one entry per POST, in order of arrival
(None: answer properly), or a function (number, path) -> entry; FAULTS names what there is.
"""

import email.utils
import http.server
import json
import math
import re
import socket
import struct
import threading
import time

REPLIES = {  # what a judge may say in place of a score
    "prose": "I would give it a 4.",
    "refusal": "I cannot help with that.",
    "empty": "",
    "nan": '{"score": NaN}',
    "out of range": '{"score": 7}',
    "two scores": '{"score": 1} {"score": 5}',
}
HANGING = ("hang", "hang in the middle", "trickle", "trickle until close", "trickle headers")
BROKEN = ("reset", "cut short", "not json", "wrong type", "huge", "redirect", "truncated")
LATER = ("429 seconds", "429 date", "503 long")  # with a Retry-After
STATUS = ("400", "401", "408", "429", "500")
FAULTS = (*HANGING, *BROKEN, *LATER, *STATUS, *REPLIES)

MARKED = re.compile(r"^([\w ]+) ([0-9a-f]{8}):\n(.*?)\n\2$", re.DOTALL | re.MULTILINE)


def texts_of(prompt):
    """What stands between equal markers in a prompt: {name: text}."""
    return {name: text for name, _, text in MARKED.findall(prompt)}


def completion(text, finish="stop", **more):
    """A reply of /chat/completions."""
    choice = {"message": {"content": text}, "finish_reason": finish, **more}
    return {"choices": [choice]}


class JudgeServer:
    """A scripted judge: rule(solution) -> 0..5; agree(dialogue) -> bool.

    `requests` holds (path, body, headers, time) of each POST.
    """

    def __init__(
        self,
        rule=lambda text: 3,
        agree=lambda text: False,
        offers=("expect", "json"),
        faults=(),
        models=("scripted",),
        hang=30.0,
    ):
        self.rule = rule
        self.agree = agree
        self.offers = offers
        self.faults = faults
        self.models = models
        self.hang = hang
        self.retry_after = 1
        self.elsewhere = "http://127.0.0.1:9/v1"  # where it redirects to
        self.requests = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.http = _Server(("127.0.0.1", 0), _Handler)
        self.http.owner = self
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=[0.02], daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def fault(self, number, path):
        """The fault of the POST with this number (from 0), or None."""
        if callable(self.faults):
            return self.faults(number, path)
        return self.faults[number] if number < len(self.faults) else None

    # -- proper answers

    def answer(self, path, body):
        """(status, reply) to a request without a fault."""
        if path.endswith("/chat/completions") and {"expect", "json"} & set(self.offers):
            usage = {"prompt_tokens": 10, "completion_tokens": 2}
            return 200, {**self._chat(body), "usage": usage}
        if path == "/pooling" and "pooling" in self.offers:
            number = self.rule(body["messages"][-1]["content"])
            return 200, {"data": [{"index": 0, "object": "pooling", "data": [number]}]}
        if path == "/classify" and "classify" in self.offers and "messages" in body:
            number = self.rule(body["messages"][-1]["content"]) / 5
            return 200, {"data": [{"index": 0, "label": "LABEL_0", "probs": [number]}]}
        if path == "/classify" and "sglang" in self.offers and "text" in body:
            number = self.rule(body["text"].split("\n\n")[-1])
            return 200, [{"embedding": [number], "meta_info": {"id": "x"}}]
        return 404, {"error": {"message": "no such endpoint"}}

    def share(self, kind, prompt):
        """The rule's answer as a number from 0 to 1."""
        texts = texts_of(prompt)
        if kind == "agreed":
            return float(self.agree(texts.get("dialogue", "")))
        if kind == "compare":
            first, second = self.rule(texts["solution A"]), self.rule(texts["solution B"])
            return 0.5 + 0.4 * ((first > second) - (first < second))
        return self.rule(texts.get("solution", "")) / 5

    def _chat(self, body):
        prompt = body["messages"][-1]["content"]
        kind = "score"
        if re.search(r'Yes or No|"agreed"', prompt):
            kind = "agreed"
        elif re.search(r'letter A or B|"winner"', prompt):
            kind = "compare"
        share = self.share(kind, prompt)
        if body.get("logprobs"):
            return self._logprobs(kind, share)
        if "json" not in self.offers:
            return completion("Well, that depends.")
        if kind == "score":
            return completion(json.dumps({"score": 5 * share}))
        if kind == "agreed":
            return completion(json.dumps({"agreed": share > 0.5}))
        winner = "A" if share > 0.5 else "B" if share < 0.5 else "tie"
        return completion(json.dumps({"winner": winner}))

    def _logprobs(self, kind, share):
        if "expect" not in self.offers:
            return completion("3")
        if kind == "score":  # the two digits around the score
            low = min(4, int(5 * share))
            likely = {str(low): low + 1 - 5 * share, str(low + 1): 5 * share - low}
        else:
            yes, no = ("Yes", "No") if kind == "agreed" else ("A", "B")
            likely = {yes: share, no: 1 - share}
        top = [{"token": t, "logprob": math.log(p)} for t, p in likely.items() if p > 0]
        first = {"token": "x", "logprob": 0.0, "top_logprobs": top}
        return completion(max(likely, key=likely.get), logprobs={"content": [first]})


class EchoServer(JudgeServer):
    """A naive judge: it repeats the last thing like a score in the solution; else it says 2."""

    SCORE = re.compile(
        r"""(?:score|rating|grade|mark)s?["'\s]*(?:is|of|=|:|->)*["'\s]*(\d+(?:\.\d+)?)"""
        r"""|(\d+(?:\.\d+)?)\s*(?:/|out of)\s*(?:5|10)\b""",
        re.I,
    )

    def __init__(self, **more):
        super().__init__(offers=("json",), **more)
        self.rule = self.last_score

    def last_score(self, text):
        """What a judge says that believes whatever claims to be a score."""
        found = [named or bare for named, bare in self.SCORE.findall(text)]
        return float(found[-1]) if found else 2.0


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, address):
        """Say nothing: clients that hang up are part of the tests."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        """Say nothing."""

    def do_GET(self):
        owner = self.server.owner
        if owner.models is None:
            return self.reply(404, {"error": "no such page"})
        self.reply(200, {"object": "list", "data": [{"id": name} for name in owner.models]})

    def do_POST(self):
        owner = self.server.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with owner.lock:
            number = len(owner.requests)
            owner.requests.append((self.path, body, dict(self.headers), time.monotonic()))
            owner.in_flight += 1
            owner.most_in_flight = max(owner.most_in_flight, owner.in_flight)
        try:
            fault = owner.fault(number, self.path)
            if fault is None:
                self.reply(*owner.answer(self.path, body))
            else:
                self.close_connection = True
                self.misbehave(fault, owner)
        finally:
            with owner.lock:
                owner.in_flight -= 1

    def reply(self, status, content, **headers):
        self.raw(status, json.dumps(content).encode(), **headers)

    def raw(self, status, data, length=None, **headers):
        self.send_response(status)
        if self.close_connection:
            headers["Connection"] = "close"
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def misbehave(self, fault, owner):
        """One way to go wrong."""
        if fault in HANGING:
            self.hang(fault, owner)
        elif fault in LATER:
            self.put_off(fault, owner)
        elif fault in REPLIES:
            self.reply(200, completion(REPLIES[fault]))
        elif fault == "truncated":
            self.reply(200, completion('{"score": 5', "length"))
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault == "cut short":
            self.raw(200, b'{"choices": [', length=5000)
        elif fault == "redirect":
            self.reply(307, {}, Location=owner.elsewhere + "/chat/completions")
        elif fault == "not json":
            self.raw(200, b"<html>Bad gateway</html>")
        elif fault == "wrong type":
            self.reply(200, {"choices": "none"})
        elif fault == "huge":
            self.raw(200, b'"' + b"x" * (8 << 20) + b'"')
        else:  # a bare status, and a text that repeats the key, as careless servers do
            said = "refused: " + self.headers.get("Authorization", "")
            self.reply(int(fault), {"error": {"message": said}})

    def hang(self, fault, owner):
        """Stay silent at the beginning or in the middle, or say a byte now and then."""
        if fault == "hang in the middle":
            self.raw(200, b'{"choices": [', length=5000)
        if not fault.startswith("trickle"):
            owner.closing.wait(owner.hang)
            return
        if fault == "trickle":
            start, byte = b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n", b" "
        elif fault == "trickle until close":
            start, byte = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b" "
        else:
            start, byte = b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x"
        self.wfile.write(start)
        ends = time.monotonic() + owner.hang
        while time.monotonic() < ends and not owner.closing.wait(0.05):
            self.wfile.write(byte)

    def put_off(self, fault, owner):
        """Tell when to come again."""
        if fault == "503 long":
            return self.reply(503, {"error": "come back later"}, Retry_After=3600)
        wait = owner.retry_after
        if fault == "429 date":
            wait = email.utils.formatdate(time.time() + wait + 1, usegmt=True)
        self.reply(429, {"error": "slow down"}, Retry_After=wait)
