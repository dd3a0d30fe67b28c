"""A client for somebody else's server, which may fail in any way: an answer or a reason.

    ask -> up to `attempts` requests within a deadline -> parse(reply) or Missing

It speaks to any OpenAI-compatible server. What does not arrive is `Missing`, with a reason that the
caller counts; nothing is made up in its place. Left out: streaming.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import email.utils
import functools
import json
import math
import os
import random
import re
import socket
import threading
import time
import urllib.parse

import requests
import urllib3

from cli import UserError

FIRST_PAUSE = 0.5  # seconds before the second attempt, about; doubled each time
LONGEST_REPLY = 4 << 20  # bytes
LONGEST_WAIT = 1e6  # seconds of one attempt, far below what timers and sockets can count
COUNTERS = {"calls": 0, "retries": 0, "retry_seconds": 0.0, "cache_hits": 0}
COUNTERS |= {"prompt_tokens": 0, "completion_tokens": 0}


class BudgetSpent(UserError):
    """--judge-budget is used up: the run saves a checkpoint and stops."""


class Missing(Exception):
    """No usable answer: `reason` is counted, `raw` is what came.

    again: whether another attempt may help, after `pause` seconds at least.
    """

    def __init__(self, reason, raw="", again=False, pause=0.0):
        super().__init__(reason)
        self.reason = reason
        self.raw = str(raw)[:500]
        self.again = again
        self.pause = pause


def dig(reply, *path, kind=object):
    """`reply[path[0]][path[1]]...`, there and of type `kind` (no bool); else Missing."""
    try:
        for step in path:
            reply = reply[step]
    except (KeyError, IndexError, TypeError):
        reply = None
    if reply is None or isinstance(reply, bool) or not isinstance(reply, kind):
        raise Missing("wrong shape", f"no {'.'.join(map(str, path))}")
    return reply


def host_of(url):
    """The host of a server's address. Raises UserError when no request could go there."""
    try:
        parts = urllib.parse.urlsplit(url)
        (parts.hostname or "").encode("idna")
    except ValueError:  # half a bracket of an IPv6 address; a label that is empty, or too long
        parts = urllib.parse.urlsplit("")
    usable = parts.scheme in ("http", "https") and parts.hostname
    if not usable or parts.username or parts.query:
        like = "must look like http://127.0.0.1:8000/v1, without a user, password or query"
        raise UserError(f"the server's address (--judge-url, --url) {like}")
    return parts.hostname


def retry_after(header):
    """Seconds that a Retry-After header asks for, as a number or as a date; 0.0 if unreadable."""
    if re.fullmatch(r"\d{1,9}(\.\d+)?", header or ""):
        return float(header)
    date = email.utils.parsedate_tz(header or "")
    if not date:
        return 0.0
    return max(0.0, email.utils.mktime_tz(date) - time.time())


class Kept:
    """A connection that keeps its socket: http.client lets go of it on "Connection: close"."""

    kept = None

    def connect(self):
        """Connect, as ever."""
        super().connect()
        self.kept = self.sock


class KeptHttp(Kept, urllib3.connection.HTTPConnection):
    """http://"""


class KeptHttps(Kept, urllib3.connection.HTTPSConnection):
    """https://"""


class Wire(requests.adapters.HTTPAdapter):
    """The connection of one worker, which `cut` ends from another thread.

    A socket's own time-out never trips while bytes trickle in, be it one a second.
    """

    connection = None

    def get_connection_with_tls_context(self, *args, **more):
        """The pool for a request, told to make connections that are remembered."""
        pool = super().get_connection_with_tls_context(*args, **more)
        kind = KeptHttps if pool.scheme == "https" else KeptHttp
        pool.ConnectionCls = functools.partial(self.remember, kind)
        return pool

    def remember(self, kind, **details):
        """A new connection; a worker has one in use at a time."""
        self.connection = kind(**details)
        return self.connection

    def cut(self):
        """End what is in flight."""
        with contextlib.suppress(OSError, AttributeError):  # it ended by itself, or never began
            open_socket = self.connection.sock or self.connection.kept
            open_socket.shutdown(socket.SHUT_RDWR)


@dataclasses.dataclass(eq=False)
class Client:
    """Requests to one server. The key goes to its origin only, and is shown nowhere."""

    url: str  # before /chat/completions
    concurrency: int = 8  # requests in flight
    timeout: float = 60.0  # seconds of one attempt, to its last byte
    attempts: int = 4  # per question
    batch_seconds: float = 600.0  # from `start_batch` until waiting ends
    budget: int = 0  # attempts in all (0: no limit)
    key: str = "JUDGE_API_KEY"  # environment variable that holds the key

    def __post_init__(self):
        self.loopback = host_of(self.url) in ("127.0.0.1", "localhost", "::1")
        self.url = self.url.rstrip("/")
        self._secret = os.environ.get(self.key, "").strip()
        if not (self._secret.isascii() and self._secret.isprintable()):
            raise UserError(f"{self.key}: holds characters that no header can carry; set it again")
        self._spent = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._wires = []
        self._worker = threading.local()  # .session and .wire of each worker
        self._pool = concurrent.futures.ThreadPoolExecutor(
            self.concurrency, "judge", initializer=self._open_session
        )
        self._counts = collections.Counter()
        self.start_batch()

    def start_batch(self):
        """From now on there are `batch_seconds` for all that is submitted before the next call."""
        self.deadline = time.monotonic() + self.batch_seconds

    def count(self, name, number=1):
        """Add to one of COUNTERS, or to the questions that are missing for the reason `name`."""
        with self._lock:
            self._counts[name] += number

    def take_stats(self):
        """The counters since the last take: a dict; `missing` holds a dict by reason."""
        with self._lock:
            taken, self._counts = self._counts, collections.Counter()
        stats = {name: taken.pop(name, zero) for name, zero in COUNTERS.items()}
        return {**stats, "missing": dict(taken)}

    def submit(self, job, *args):
        """Run `job(*args, deadline)` on a worker (only workers may `ask`); a Future.

        deadline: of this batch, on time.monotonic. A question that comes late, because playing took
        long, has time for one attempt all the same.
        """
        now = time.monotonic()
        one_attempt = min(self.timeout, self.batch_seconds)
        deadline = self.deadline if self.deadline > now + one_attempt / 2 else now + one_attempt
        return self._pool.submit(job, *args, deadline)

    def ask(self, path, payload, parse, deadline=math.inf, root=False):
        """`parse(reply)` of a POST of `payload` (None: a GET).

        root: `path` stands beside /v1, not below it. Raises Missing when no answer that parses
        comes in time, BudgetSpent.
        """
        url = (self.url.removesuffix("/v1") if root else self.url) + path
        body = None if payload is None else json.dumps(payload, sort_keys=True).encode()
        return parse(self._persist(url, body, deadline))

    def _persist(self, url, body, deadline):
        """The reply of the first attempt that succeeds, with longer and longer pauses between."""
        jitter = random.Random(body)
        for attempt in range(1, self.attempts + 1):
            try:
                return self._attempt(url, body, deadline)
            except Missing as miss:
                doubled = FIRST_PAUSE * 2 ** (attempt - 1)
                pause = max(miss.pause, doubled * (0.5 + jitter.random()))
                too_late = time.monotonic() + pause >= deadline
                if not miss.again or attempt == self.attempts or too_late:
                    raise
            self.count("retries")
            self.count("retry_seconds", pause)
            self._closing.wait(pause)

    def _attempt(self, url, body, deadline):
        """One request, bounded in time whatever the server does: the decoded JSON, or Missing."""
        started = time.monotonic()
        limit = min(self.timeout, deadline - started)
        if limit <= 0 or self._closing.is_set():
            raise Missing("deadline")
        self._spend(free=body is None)  # a list of models costs nothing
        timer = threading.Timer(limit, self._worker.wire.cut)
        timer.start()
        try:
            reply, text = self._receive(url, body, limit)
        except OSError as error:
            late = time.monotonic() - started >= limit
            raise self._failure(error, late) from None
        finally:
            timer.cancel()
        if time.monotonic() - started >= limit:  # a cut can look like the end of the reply
            raise Missing("timeout", again=True)
        return self._decode(reply, text)

    def _spend(self, free):
        """Count an attempt, and take it from the budget."""
        with self._lock:
            if not free:
                if self.budget and self._spent >= self.budget:
                    raise BudgetSpent(f"--judge-budget {self.budget}: all calls are used")
                self._spent += 1
            self._counts["calls"] += 1

    def _receive(self, url, body, limit):
        text = b""
        method = "GET" if body is None else "POST"
        how = {"stream": True, "allow_redirects": False, "timeout": (min(10.0, limit), limit)}
        with self._worker.session.request(method, url, data=body, **how) as reply:
            for chunk in reply.iter_content(1 << 16):
                text += chunk
                if len(text) > LONGEST_REPLY:
                    raise Missing("too large")
        return reply, text

    def _failure(self, error, late):
        """What a request that broke off counts as; a certificate does not mend by asking again.

        Only a REQUESTS_CA_BUNDLE that is not there is an OSError of no kind that requests knows.
        """
        said = self._hide(str(error))
        if late or isinstance(error, requests.Timeout):
            return Missing("timeout", said, again=True)
        known = isinstance(error, requests.RequestException)
        if not known or isinstance(error, requests.exceptions.SSLError):
            return Missing("tls", said)
        if isinstance(error, requests.exceptions.ProxyError):
            return Missing("proxy", said)
        return Missing("connection", said, again=True)

    def _decode(self, reply, text):
        status = reply.status_code
        said = self._hide(text.decode("utf-8", "replace"))
        if 300 <= status < 400:
            raise Missing("redirect", self._hide(reply.headers.get("Location", "")))
        if status != 200:
            again = status in (408, 409, 429) or (status >= 500 and status != 501)
            pause = retry_after(reply.headers.get("Retry-After"))
            raise Missing(f"http {status}", said, again, pause)
        try:
            decoded = json.loads(text)
        except (ValueError, RecursionError):
            raise Missing("not json", said) from None
        for name in ("prompt_tokens", "completion_tokens"):
            with contextlib.suppress(Missing):  # not every server tells
                self.count(name, dig(decoded, "usage", name, kind=int))
        return decoded

    def _open_session(self):
        """Give this worker a session of its own: no proxy on loopback, no .netrc."""
        wire = self._worker.wire = Wire()
        session = self._worker.session = requests.Session()
        session.trust_env = not self.loopback
        session.auth = self._sign  # here nothing overrules it
        session.headers.update({"Content-Type": "application/json", "Accept-Encoding": "identity"})
        session.mount("http://", wire)
        session.mount("https://", wire)
        self._wires.append(wire)

    def _sign(self, request):
        if self._secret:
            request.headers["Authorization"] = "Bearer " + self._secret
        return request

    def _hide(self, text):
        return text.replace(self._secret, "***")[:500] if self._secret else text[:500]

    def close(self):
        """Cut what is in flight, drop what waits, end the workers."""
        self._closing.set()
        for wire in self._wires:
            wire.cut()
        self._pool.shutdown(cancel_futures=True)
