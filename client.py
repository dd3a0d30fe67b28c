"""A client for somebody else's server, which may fail in any way: an answer, or the reason why there is none.

`Client` asks any OpenAI-compatible server over HTTP: many calls at once, bounded attempts, one deadline for a batch, a budget, answers kept
on disk. What does not arrive is `Missing`, with a reason that is counted; nothing is made up in its place.
"""

import concurrent.futures
import contextlib
import email.utils
import hashlib
import json
import math
import os
import random
import re
import socket
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import requests
import urllib3

from cli import UserError

FIRST_PAUSE, LONGEST_REPLY = 0.5, 4 << 20  # seconds before the second attempt; bytes of a reply


class BudgetSpent(UserError):
    """--judge-budget is used up: the run saves a checkpoint and stops."""


class Missing(Exception):
    """No usable answer. reason: what is counted; raw: what came; again: whether another attempt may help, after `pause` seconds."""

    def __init__(self, reason, raw="", again=False, pause=0.0):
        super().__init__(reason)
        self.reason, self.raw, self.again, self.pause = reason, str(raw)[:500], again, pause


def dig(reply, *path, kind=object):
    """`reply[path[0]][path[1]]...`, which must be there and of type `kind`; else Missing("wrong shape")."""
    for step in path:
        inside = (
            isinstance(reply, dict)
            and step in reply
            or isinstance(reply, list)
            and isinstance(step, int)
            and step < len(reply)
        )
        reply = reply[step] if inside else None
    if not isinstance(reply, kind) or reply is None or isinstance(reply, bool):
        raise Missing("wrong shape", f"no {'.'.join(map(str, path))}")
    return reply


def _retry_after(value):
    """Seconds that a Retry-After header asks for, as a number or as a date; 0.0 without a readable one."""
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value or ""):
        return float(value)
    date = email.utils.parsedate_tz(value or "")
    return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0


class Client:
    """Requests to an OpenAI-compatible server: at most `concurrency` at once, bounded attempts, one deadline per batch.

    url ends before /chat/completions. timeout: seconds that one attempt may take, to its last byte. batch_seconds: seconds from
    `start_batch` after which nothing is waited for. budget: attempts in all (0: no limit). cache: folder of answers, or None.
    The key in the environment variable `key` goes to this origin only (redirects are not followed) and is shown nowhere.
    """

    def __init__(
        self,
        url,
        concurrency=8,
        timeout=60.0,
        attempts=4,
        batch_seconds=600.0,
        budget=0,
        cache=None,
        key="JUDGE_API_KEY",
    ):
        try:
            parts = urllib.parse.urlsplit(url)
        except ValueError:  # half a bracket of an IPv6 address
            parts = urllib.parse.urlsplit("")
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.username
            or parts.query
        ):
            raise UserError(
                "--judge-url: must look like http://127.0.0.1:8000/v1, without a user, password or query"
            )
        self.url, self.loopback = (
            url.rstrip("/"),
            parts.hostname in ("127.0.0.1", "localhost", "::1"),
        )
        self.timeout, self.attempts, self.batch_seconds, self.budget, self.cache = (
            timeout,
            attempts,
            batch_seconds,
            budget,
            cache,
        )
        self.key, self._key, self._lock, self._closing, self._spent = (
            key,
            os.environ.get(key, "").strip(),
            threading.Lock(),
            threading.Event(),
            0,
        )
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(
                f"{key}: holds characters that no header can carry; set it again, without quotes"
            )
        self._own, self._wires, self.stats = threading.local(), [], {}
        self._pool = concurrent.futures.ThreadPoolExecutor(
            concurrency, "judge", initializer=self._open_session
        )
        self.take_stats()
        self.start_batch()

    def start_batch(self):
        """From now on there are `batch_seconds` for all that is submitted before the next call."""
        self.ends = time.monotonic() + self.batch_seconds

    def take_stats(self):
        """The counters since the last take: a dict; `missing` holds a dict of its own, by reason."""
        fresh = {
            "calls": 0,
            "retries": 0,
            "retry_seconds": 0.0,
            "cache_hits": 0,
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "missing": {},
        }
        with self._lock:
            taken, self.stats = self.stats, fresh
        return taken

    def count(self, missing=None, **more):
        """Add to the counters."""
        with self._lock:
            for table, name, n in [(self.stats, *item) for item in more.items()] + [
                (self.stats["missing"], missing, 1)
            ] * bool(missing):
                table[name] = table.get(name, 0) + n

    def submit(self, job, *args):
        """Run `job(*args, ends)` on a worker; a Future. `ends` is the deadline of the present batch, but a question that comes late,
        because playing took long, has time for one attempt all the same. Only workers may `ask`."""
        now, one = time.monotonic(), min(self.timeout, self.batch_seconds)
        return self._pool.submit(job, *args, self.ends if self.ends > now + one / 2 else now + one)

    def ask(self, path, payload, parse, ends=math.inf, root=False):
        """`parse(reply)` of a POST of `payload` (None: a GET). Raises Missing when no answer parses in time, BudgetSpent.

        root: `path` stands beside /v1, not below it."""
        url = (self.url.removesuffix("/v1") if root else self.url) + path
        body = None if payload is None else json.dumps(payload, sort_keys=True).encode()
        digest = hashlib.sha256(b"\0".join([url.encode(), body or b""])).hexdigest()
        kept = self.cache and body and Path(self.cache, digest[:2], digest + ".json")
        if kept:
            with contextlib.suppress(OSError, ValueError, Missing):  # not there, or not whole: ask
                value = parse(json.loads(kept.read_bytes()))
                self.count(cache_hits=1)
                return value
        jitter = random.Random(digest)
        for attempt in range(1, self.attempts + 1):
            try:
                reply = self._once(url, body, ends)
                value = parse(reply)
                break
            except Missing as miss:
                pause = max(
                    miss.pause, FIRST_PAUSE * 2 ** (attempt - 1) * (0.5 + jitter.random())
                )  # doubled each time, with jitter
                if not miss.again or attempt == self.attempts or time.monotonic() + pause >= ends:
                    raise
                self.count(retries=1, retry_seconds=pause)
                if self._closing.wait(pause):
                    raise
        if kept:
            self._keep(kept, reply)
        return value

    def _keep(self, path, reply):
        """Write an answer to the cache under a temporary name, then rename it: other ranks, or a kill, see all of it or nothing."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.stem}.{os.getpid()}-{threading.get_ident()}.part")
            part.write_text(json.dumps(reply))
            part.replace(path)
        except OSError as error:  # a full disk costs the cache, not the run
            print(
                f"warning: --judge-cache: cannot write ({error.strerror}); going on without it",
                file=sys.stderr,
                flush=True,
            )
            self.cache = None

    def _once(self, url, body, ends):
        """One attempt: the decoded JSON of a reply with status 200; else Missing."""
        limit, started, text = min(self.timeout, ends - time.monotonic()), time.monotonic(), b""
        if limit <= 0 or self._closing.is_set():
            raise Missing("deadline")
        with self._lock:
            if self.budget and self._spent >= self.budget and body is not None:
                raise BudgetSpent(f"--judge-budget {self.budget}: all calls are used")
            self._spent += body is not None  # asking for the list of models costs nothing
            self.stats["calls"] += 1
        clock = threading.Timer(
            limit, _cut, [self._own.wire]
        )  # a trickle of bytes never trips a socket's own time-out
        clock.start()
        try:
            with self._own.session.request(
                "GET" if body is None else "POST",
                url,
                data=body,
                stream=True,
                allow_redirects=False,
                timeout=(min(10.0, limit), limit),
            ) as reply:
                for chunk in reply.iter_content(1 << 16):
                    text += chunk
                    if len(text) > LONGEST_REPLY:
                        raise Missing("too large")
        except requests.RequestException as error:
            late = isinstance(error, requests.Timeout) or time.monotonic() - started >= limit
            kinds = {requests.exceptions.SSLError: "tls", requests.exceptions.ProxyError: "proxy"}
            why = "timeout" if late else kinds.get(type(error), "connection")
            raise Missing(why, self._hide(str(error)), again=why not in kinds.values()) from None
        finally:
            clock.cancel()
        if time.monotonic() - started >= limit:
            raise Missing("timeout", again=True)
        status, said = reply.status_code, self._hide(text.decode("utf-8", "replace"))
        if 300 <= status < 400:
            raise Missing("redirect", self._hide(reply.headers.get("Location", "")))
        if status != 200:
            raise Missing(
                f"http {status}",
                said,
                status in (408, 409, 429) or status >= 500,
                _retry_after(reply.headers.get("Retry-After")),
            )
        try:
            decoded = json.loads(text)
        except (ValueError, RecursionError):
            raise Missing("not json", said) from None
        usage = decoded.get("usage") if isinstance(decoded, dict) else None
        if isinstance(usage, dict):
            self.count(
                **{
                    k: usage[k]
                    for k in ("prompt_tokens", "completion_tokens")
                    if type(usage.get(k)) is int
                }
            )
        return decoded

    def _open_session(self):
        """A worker's own session: no proxy for loopback, no .netrc. `wire` holds its latest connection, so that a clock can cut it."""

        def sign(request):  # set as `auth`, so that nothing overrules it
            request.headers.update({"Authorization": "Bearer " + self._key} if self._key else {})
            return request

        self._own.session, self._own.wire = session, wire = requests.Session(), []
        self._wires.append(wire)
        session.trust_env, session.auth = not self.loopback, sign
        session.headers.update({"Content-Type": "application/json", "Accept-Encoding": "identity"})
        adapter = requests.adapters.HTTPAdapter()
        adapter.poolmanager.pool_classes_by_scheme = {
            "http": _watched(urllib3.HTTPConnectionPool, wire),
            "https": _watched(urllib3.HTTPSConnectionPool, wire),
        }
        session.mount("http://", adapter)
        session.mount("https://", adapter)

    def _hide(self, text):
        return text.replace(self._key, "***")[:500] if self._key else text[:500]

    def close(self):
        """Cut what is in flight, drop what waits, end the workers."""
        self._closing.set()
        for wire in self._wires:
            _cut(wire)
        self._pool.shutdown(cancel_futures=True)


def _watched(pool, wire):
    """A urllib3 connection pool whose connections put themselves on `wire` when they connect."""

    class Connection(pool.ConnectionCls):
        def connect(self):
            wire[:] = [self]
            super().connect()

    return type("Watched", (pool,), {"ConnectionCls": Connection})


def _cut(wire):
    for connection in wire[:]:
        with contextlib.suppress(OSError, AttributeError):  # it ended by itself, or never began
            connection.sock.shutdown(socket.SHUT_RDWR)
