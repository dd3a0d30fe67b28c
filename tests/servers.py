"""Servers for tests, on loopback: a judge whose rule everybody can read, and all that may go wrong on the way to it.

    with JudgeServer(lambda text: 5 * ("together" in text)) as server:
        judge = reward.Judge(settings, server.url)

`offers` says what it has: "expect" (top log-probs), "json"; "pooling", "classify" (as vLLM has them), "sglang" (its /classify). `faults` is a list with one
entry per POST, in order of arrival (None: answer properly), or a function (number, path) -> entry; FAULTS names what there is.
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

FAULTS = (
    "hang",
    "hang in the middle",
    "trickle",
    "trickle headers",
    "reset",
    "429",
    "429 seconds",
    "429 date",
    "500",
    "503 long",
    "408",
    "cut short",
    "not json",
    "wrong type",
    "huge",
    "redirect",
    "prose",
    "refusal",
    "empty",
    "nan",
    "out of range",
    "two scores",
    "truncated",
    "400",
    "401",
)
REPLIES = {
    "prose": "I would give it a 4.",
    "refusal": "I cannot help with that.",
    "empty": "",
    "nan": '{"score": NaN}',
    "out of range": '{"score": 7}',
    "two scores": '{"score": 1} {"score": 5}',
}


def texts_of(prompt):
    """What stands between equal markers in a prompt: {name: text}."""
    return {
        name: text
        for name, _, text in re.findall(
            r"^([\w ]+) ([0-9a-f]{8}):\n(.*?)\n\2$", prompt, re.DOTALL | re.MULTILINE
        )
    }


class JudgeServer:
    """A scripted judge. rule(solution) -> 0..5; agree(dialogue) -> bool; `requests` holds (path, body, headers, time) of each POST."""

    def __init__(
        self,
        rule=lambda text: 3,
        agree=lambda text: False,
        offers=("expect", "json"),
        faults=(),
        models=("scripted",),
        hang=30.0,
    ):
        self.rule, self.agree, self.offers, self.faults, self.models, self.hang = (
            rule,
            agree,
            offers,
            faults,
            models,
            hang,
        )
        self.requests, self.in_flight, self.most_in_flight, self.lock = [], 0, 0, threading.Lock()
        self.closing, self.retry_after, self.elsewhere = (
            threading.Event(),
            1,
            "http://127.0.0.1:9/v1",
        )
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.http.daemon_threads, self.http.owner, self.http.handle_error = (
            True,
            self,
            lambda *args: None,
        )
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
            return 200, self._chat(body)
        if path == "/pooling" and "pooling" in self.offers:
            return 200, {
                "object": "list",
                "data": [
                    {
                        "index": 0,
                        "object": "pooling",
                        "data": [self.rule(body["messages"][-1]["content"])],
                    }
                ],
            }
        if path == "/classify" and "classify" in self.offers and "messages" in body:
            return 200, {
                "data": [
                    {
                        "index": 0,
                        "label": "LABEL_0",
                        "probs": [self.rule(body["messages"][-1]["content"]) / 5],
                        "num_classes": 1,
                    }
                ]
            }
        if path == "/classify" and "sglang" in self.offers and "text" in body:
            return 200, [
                {"embedding": [self.rule(body["text"].split("\n\n")[-1])], "meta_info": {"id": "x"}}
            ]
        return 404, {"error": {"message": "no such endpoint"}}

    def share(self, kind, prompt):
        """The rule's answer as a number from 0 to 1."""
        texts = texts_of(prompt)
        if kind == "agreed":
            return float(self.agree(texts.get("dialogue", "")))
        if kind == "compare":
            a, b = self.rule(texts["solution A"]), self.rule(texts["solution B"])
            return 0.5 + 0.4 * ((a > b) - (a < b))
        return self.rule(texts.get("solution", "")) / 5

    def _chat(self, body):
        prompt = body["messages"][-1]["content"]
        signs = {"agreed": r'Yes or No|"agreed"', "compare": r'letter A or B|"winner"'}
        kind = next((kind for kind, sign in signs.items() if re.search(sign, prompt)), "score")
        share = self.share(kind, prompt)
        if body.get("logprobs"):
            if "expect" not in self.offers:
                return {"choices": [{"message": {"content": "3"}, "finish_reason": "stop"}]}
            if kind == "score":  # the two digits around the score
                low = min(4, int(5 * share))
                likely = {str(low): low + 1 - 5 * share, str(low + 1): 5 * share - low}
            else:
                likely = dict(
                    zip(("Yes", "No") if kind == "agreed" else ("A", "B"), (share, 1 - share))
                )
            top = [{"token": t, "logprob": math.log(p)} for t, p in likely.items() if p > 0]
            said, extra = (
                max(likely, key=likely.get),
                {"logprobs": {"content": [{"token": "x", "logprob": 0.0, "top_logprobs": top}]}},
            )
        else:
            said, extra = (
                json.dumps(
                    {
                        "score": {"score": 5 * share},
                        "agreed": {"agreed": share > 0.5},
                        "compare": {
                            "winner": "A" if share > 0.5 else "B" if share < 0.5 else "tie"
                        },
                    }[kind]
                ),
                {},
            )
            if "json" not in self.offers:
                said = "Well, that depends."
        return {
            "choices": [{"message": {"content": said}, "finish_reason": "stop", **extra}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 2},
        }


class EchoServer(JudgeServer):
    """A naive judge: it repeats the last thing like a score that it finds in the completion; else it says 2. It answers JSON only."""

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
        found = [a or b for a, b in self.SCORE.findall(text)]
        return float(found[-1]) if found else 2.0


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    log_message = lambda *args: None

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
            if fault:
                self.misbehave(fault, owner, body)
            else:
                self.reply(*owner.answer(self.path, body))
        finally:
            with owner.lock:
                owner.in_flight -= 1

    def reply(self, status, content, **headers):
        self.raw(status, json.dumps(content).encode(), **headers)

    def raw(self, status, data, length=None, **headers):
        self.send_response(status)
        headers.update({"Connection": "close"} if self.close_connection else {})
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": len(data) if length is None else length,
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def misbehave(self, fault, owner, body):
        """One way to go wrong."""
        self.close_connection = True
        if fault == "hang":
            owner.closing.wait(owner.hang)
        elif fault == "hang in the middle":
            self.raw(200, b'{"choices": [', length=5000)
            owner.closing.wait(owner.hang)
        elif fault in ("trickle", "trickle headers"):
            whole = b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n"
            self.wfile.write(whole if fault == "trickle" else b"HTTP/1.1 200 OK\r\nX-Slow: ")
            ends = time.monotonic() + owner.hang
            while time.monotonic() < ends and not owner.closing.wait(0.05):
                self.wfile.write(b" " if fault == "trickle" else b"x")
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault == "cut short":
            self.raw(200, b'{"choices": [', length=5000)
        elif fault == "429 seconds":
            self.reply(429, {"error": "slow down"}, Retry_After=owner.retry_after)
        elif fault == "429 date":
            self.reply(
                429,
                {"error": "slow down"},
                Retry_After=email.utils.formatdate(
                    time.time() + owner.retry_after + 1, usegmt=True
                ),
            )
        elif fault == "503 long":
            self.reply(503, {"error": "come back later"}, Retry_After=3600)
        elif fault == "redirect":
            self.reply(307, {}, Location=owner.elsewhere + "/chat/completions")
        elif fault == "not json":
            self.raw(200, b"<html>Bad gateway</html>")
        elif fault == "wrong type":
            self.reply(200, {"choices": "none"})
        elif fault == "huge":
            self.raw(200, b'"' + b"x" * (8 << 20) + b'"')
        elif fault == "truncated":
            self.reply(
                200,
                {"choices": [{"message": {"content": '{"score": 5'}, "finish_reason": "length"}]},
            )
        elif fault in REPLIES:
            self.reply(
                200,
                {"choices": [{"message": {"content": REPLIES[fault]}, "finish_reason": "stop"}]},
            )
        else:  # a bare status, and an error text that repeats the key, as careless servers do
            self.reply(
                int(fault),
                {"error": {"message": "refused: " + self.headers.get("Authorization", "")}},
            )
