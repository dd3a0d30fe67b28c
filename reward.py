"""The judge: a joint solution goes in, a Collective Agency (CA) score comes out, or nothing.

    dialogue -> a Case and a question -> HTTP, any OpenAI-compatible server -> a reading -> Verdict

`auto` takes the first of expect, json (both /chat/completions) and rm (/pooling or /classify) that
the server really gives, once, before the run. What does not arrive in time is missing, with a
reason; no score is ever made up. What is asked and how it is read stands in rubric.py, the wire in
client.py. Without --judge-url the judge is judge_server.py. Left out: streaming, tools.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import rubric
from cli import UserError, option
from client import LONGEST_WAIT, Client, Missing
from rubric import Case, Verdict

# ---- the judge -----------------------------------------------------------------------------------

MODES = ("expect", "json", "rm")  # best first


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """Who judges, and how the answers are read."""

    judge_url: str = option("", "OpenAI-compatible server, up to /v1 (empty: the embedded judge)")
    judge_model: str = option("", "model to ask for (empty: the first that the server lists)")
    judge_mode: str = option("auto", "auto: the first that works", choices=("auto", *MODES))
    judge_sees: str = option("final", "dialogue: the turns too", choices=("final", "dialogue"))
    judge_noise: float = option(0.02, "rewards of a group this close count as equal", low=0)
    judge_concurrency: int = option(8, "calls in flight over all ranks, at least 1 each", low=1)
    judge_timeout: float = option(60.0, "seconds of one attempt", above=0, high=LONGEST_WAIT)
    judge_deadline: float = option(600.0, "seconds for all judging of one step", above=0)
    judge_wait: float = option(60.0, "seconds to wait for a server that is still loading", low=0)
    judge_attempts: int = option(4, "attempts per question", low=1)
    judge_budget: int = option(0, "judge calls in all, then the run stops (0: no limit)", low=0)
    judge_tokens: int = option(64, "tokens of a JSON answer, with a judge's thoughts", low=8)
    rubric: str = option("", "JSON file that replaces RUBRIC of rubric.py")


@dataclasses.dataclass(frozen=True)
class Way:
    """How this server is asked: found before the run, the same on all ranks."""

    model: str
    mode: str  # expect, json or rm
    listed: tuple = ()  # the models that the server lists
    limit: str = "max_tokens"  # its name for the tokens of an answer
    cold: bool = True  # whether it takes a temperature of 0
    endpoint: str = "/pooling"  # of a reward model
    one_text: bool = False  # whether that wants a text in place of messages


CHAT_WAYS = (
    {"limit": "max_tokens", "cold": True},
    {"limit": "max_completion_tokens", "cold": True},
    {"limit": "max_tokens", "cold": False},
    {"limit": "max_completion_tokens", "cold": False},
)
REWARD_WAYS = (
    {"endpoint": "/pooling", "one_text": False},  # vLLM
    {"endpoint": "/classify", "one_text": False},  # vLLM
    {"endpoint": "/classify", "one_text": True},  # SGLang
)
EASY = Case(
    "Dilemma: Ana wants the window open at night, Ben wants it shut.\n",
    {"solution": "They open it for ten minutes before bed, and talk again after a week."},
    {},
)

NO_SUCH_PLACE = ("http 404", "http 405", "http 501")
# the server understood something else: another way may be right
REFUSED = ("http 400", "http 422", *NO_SUCH_PLACE, "no single reward", "not json")
LOADING = ("connection", "http 502", "http 503")  # worth waiting for
NOT_THERE = (*LOADING, "timeout", "deadline", "http 504")
OTHERWISE = "try another --judge-mode or --judge-model, or more --judge-tokens"
ADVICE = {
    "http 401": "set the environment variable {key} to a key that it takes",
    "http 402": "the account has nothing left to spend; top it up, or use another server",
    "http 403": "look at {key}, or at the proxy between here and there",
    "http 429": "it is busy; wait, or lower --judge-concurrency",
    "redirect": "give the address that it redirects to",
    "tls": "look at the certificate and REQUESTS_CA_BUNDLE, or use http:// for a server of yours",
    "proxy": "look at HTTPS_PROXY and NO_PROXY",
    "truncated": "it thinks aloud, or keeps to no form; try --judge-tokens 2000",
    **dict.fromkeys(NOT_THERE, "start the server, correct the address, or raise --judge-wait"),
}


class Judge:
    """Asks a server: `preflight` first, then each question is a Future of a Verdict.

    A score that came is kept for as long as the judge lives: the same text, the same reward.
    """

    def __init__(self, settings, url, key="JUDGE_API_KEY"):
        self.settings = settings
        self.rubric = rubric.load_rubric(settings.rubric)
        self.way = Way(settings.judge_model, settings.judge_mode)
        self.answers = {}  # digest of a question -> Future
        self.client = Client(
            url,
            concurrency=settings.judge_concurrency,
            timeout=settings.judge_timeout,
            attempts=settings.judge_attempts,
            batch_seconds=settings.judge_deadline,
            budget=settings.judge_budget,
            key=key,
        )
        self.start_batch = self.client.start_batch
        self.take_stats = self.client.take_stats
        self.close = self.client.close

    @property
    def model(self):
        """The model that is asked."""
        return self.way.model

    @property
    def mode(self):
        """How it is read."""
        return self.way.mode

    def score(self, dilemma, personas, turns, final):
        """A Future of a Verdict whose value is a joint solution's CA score, a float (0 to 5, or
        of a reward model any number); None where it is missing, here and below."""
        texts = {"solution": rubric.clean(final)}
        if self.settings.judge_sees == "dialogue":
            texts = {"dialogue": rubric.spoken(personas, turns), **texts}
        return self._ask("score", dilemma, personas, texts)

    def agreed(self, dilemma, personas, turns):
        """A Future of a Verdict whose value is whether the core direction is settled: a bool."""
        return self._ask("agreed", dilemma, personas, {"dialogue": rubric.spoken(personas, turns)})

    def endorse(self, dilemma, persona, final):
        """A Future of a Verdict whose value is how satisfied one persona is, a float likewise."""
        texts = {"solution": rubric.clean(final)}
        return self._ask("endorse", dilemma, [persona], texts, name=rubric.clean(persona["name"]))

    def compare(self, dilemma, personas, first, second, question):
        """A Future of a Verdict: the better one by `question`, "A" (the first), "B" or "tie"."""
        texts = {"solution A": rubric.clean(first), "solution B": rubric.clean(second)}
        return self._ask("compare", dilemma, personas, texts, question=question)

    def can(self, kind):
        """Whether this judge takes that question; an outside reward model knows scores only."""
        if self.mode != "rm" or kind in ("score", "compare"):
            return True
        return f"{self.model}:{kind}" in self.way.listed

    def check_agreement(self, settings):
        """Raise UserError where `settings` let a judge who can only score say when they agree."""
        if settings.agreement == "judge" and settings.max_turns and not self.can("agreed"):
            raise UserError(
                f"--agreement judge: {self.model} is a reward model and knows scores only; "
                "add --agreement marker, or none"
            )

    def _ask(self, kind, dilemma, personas, texts, **slots):
        texts = {name: text or "(nothing)" for name, text in texts.items()}
        case = Case(rubric.case_of(dilemma, personas), texts, slots)
        question = json.dumps([kind, case.before, texts, slots])
        digest = hashlib.sha256(question.encode()).digest()
        known = self.answers.get(digest)
        failed = known and known.done() and (known.exception() or known.result().value is None)
        if known and not failed:
            self.client.count("cache_hits")
            return known
        asked = self.client.submit(self._answer, kind, case)
        if kind != "agreed":  # a dialogue is asked about once; its joint solution may come again
            self.answers[digest] = asked
        return asked

    def _answer(self, kind, case, deadline):
        """On a worker: a Verdict, whatever happens (only BudgetSpent goes up)."""
        try:
            return self._read(kind, case, deadline)
        except Missing as miss:
            self.client.count(miss.reason)
            return Verdict(None, miss.reason, miss.raw)

    def _read(self, kind, case, deadline):
        """One question, asked and read in the way that was found. Raises Missing."""
        if self.mode == "rm":
            return self._read_reward(kind, case, deadline)
        question = rubric.QUESTIONS[kind]
        payload = {"model": self.model}
        if self.mode == "expect":
            read = functools.partial(rubric.read_expect, kind)
            payload["messages"] = rubric.for_chat(self.rubric, kind, case, question.in_a_word)
            payload[self.way.limit] = 1
            payload["logprobs"] = True
            payload["top_logprobs"] = 10
        else:
            read = functools.partial(rubric.read_chat, kind)
            payload["messages"] = rubric.for_chat(self.rubric, kind, case, question.in_json)
            payload[self.way.limit] = self.settings.judge_tokens
        if self.way.cold:
            payload["temperature"] = 0
        return self.client.ask("/chat/completions", payload, read, deadline)

    def _read_reward(self, kind, case, deadline):
        """What a reward model gives; of two solutions, the one with the higher number."""
        if kind == "compare":
            alone = [Case(case.before, {"solution": text}, {}) for text in case.texts.values()]
            first, second = [self._read_reward("score", one, deadline).value for one in alone]
            raw = f"{first}, {second}"
            if abs(first - second) <= self.settings.judge_noise:
                return Verdict("tie", raw=raw)
            return Verdict("A" if first > second else "B", raw=raw)
        if not self.can(kind):
            raise Missing("not a reward model's question", kind)
        before, judged = rubric.for_reward_model(kind, case)
        # our own server has a head for each question
        payload = {"model": self.model if kind == "score" else f"{self.model}:{kind}"}
        if self.way.one_text:
            payload["text"] = "\n\n".join([*before, judged])
        else:
            payload["messages"] = [{"role": "user", "content": text} for text in before]
            payload["messages"].append({"role": "assistant", "content": judged})
        value = self.client.ask(self.way.endpoint, payload, rubric.read_reward, deadline, root=True)
        return Verdict(value > 0.5 if kind == "agreed" else round(value, 3), raw=f"{value:.4f}")

    # -- before the run

    def preflight(self):
        """Find the way to ask, once the server has loaded; a line that says so.

        Raises UserError with what to change.
        """
        until = time.monotonic() + self.settings.judge_wait
        told = False
        while misses := self._find_way():
            last = list(misses.values())[-1]
            if last.reason not in LOADING or time.monotonic() >= until:
                raise UserError(self._complaint(misses))
            if not told:
                print(f"waiting for the judge at {self.client.url} ({last})", file=sys.stderr)
                told = True
            time.sleep(min(1.0, max(0.0, until - time.monotonic())))
        if not self.model:
            raise UserError("--judge-model: the server does not list its models; name one")
        listed = self.way.listed
        if listed and self.model not in listed:  # routers serve names that they do not list
            warning = f"warning: --judge-model {self.model}: the server lists"
            print(warning, ", ".join(listed)[:200], file=sys.stderr)
        return f"judge: {self.model} at {self.client.url}, read by {self.mode}"

    def _find_way(self):
        """Set `way` to the first that gives an answer; {mode: Missing} when none does."""
        asked = self.client.submit(self.client.ask, "/models", None, rubric.read_models)
        try:
            listed = asked.result()
        except Missing:
            listed = []  # a server without that page is trusted
        model = self.settings.judge_model or next(iter(listed), "")
        wanted = self.settings.judge_mode
        misses = {}
        for mode in MODES if wanted == "auto" else (wanted,):
            self.way = Way(model, mode, tuple(listed))
            try:
                self.client.submit(self._try).result()
                return {}
            except Missing as miss:
                misses[mode] = miss
                if miss.reason in NOT_THERE:
                    break
        return misses

    def _try(self, deadline):
        """Ask one easy question in this mode, in words that the server takes. Raises Missing."""
        for changes in REWARD_WAYS if self.mode == "rm" else CHAT_WAYS:
            self.way = dataclasses.replace(self.way, **changes)
            try:
                return self._read("score", EASY, deadline)
            except Missing as miss:
                last = miss
                if miss.reason not in REFUSED:
                    break
        raise last

    def _complaint(self, misses):
        """What went wrong, in the server's own words, and what to do about it."""
        telling = [misses[mode] for mode in ("json", "expect", "rm") if mode in misses]
        there = [miss for miss in telling if miss.reason not in NO_SUCH_PLACE]
        miss = (there or telling)[0]
        said = " ".join(miss.raw.split())[:300]
        problem = f"{self.model or 'it'} gives no usable answer to --judge-mode {', '.join(misses)}"
        if miss.reason in NOT_THERE:
            problem = "nobody answers there"
        advice = ADVICE.get(miss.reason, OTHERWISE)
        spent = re.search("quota|billing|insufficient|credit", miss.raw, re.IGNORECASE)
        if spent and miss.reason.startswith("http "):
            advice = ADVICE["http 402"]
        url = self.client.url
        base = url.removesuffix("/chat/completions")
        if base == url and not url.endswith("/v1"):
            base += "/v1"
        if miss.reason == "http 404" and base != url:
            advice = f"try --judge-url {base}"
        advice = rubric.fill(advice, {"key": self.client.key})
        return f"--judge-url {url}: {problem} ({miss.reason}: {said}); {advice}"


# ---- from a command to a judge -------------------------------------------------------------------

EMBEDDED = "negotiation-judge"  # how the names of judge_server.py begin


@contextlib.contextmanager
def embedded_server():
    """The URL of judge_server.py, a child process until the end of the block.

    Its standard input is a pipe that we hold, so it ends when we do, even by kill -9; it has a
    session of its own, so that Ctrl-C reaches us alone. Raises UserError when it does not start.
    """
    server = Path(__file__).with_name("judge_server.py")
    process = subprocess.Popen(
        [sys.executable, str(server), "--port", "0", "--until-eof"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        url = process.stdout.readline().rpartition(" ")[2].strip()
        if not url:
            raise UserError("the embedded judge did not start (its own message stands above)")
        yield url
    finally:
        process.terminate()
        process.communicate()  # waits, and closes the pipes


@contextlib.contextmanager
def open_judge(settings, rank=0, broadcast=lambda value: value, key="JUDGE_API_KEY"):
    """The judge that `settings` name, after its preflight, closed at the end of the block.

    Rank 0 starts the embedded server (without --judge-url) and finds the way to ask; `broadcast`
    gives the other ranks rank 0's value: all of them ask alike. key: the environment variable.
    """
    if settings.judge_model and not settings.judge_url:
        if not settings.judge_model.startswith(EMBEDDED):
            raise UserError("--judge-model: the embedded judge has no other; add a --judge-url")
        settings = dataclasses.replace(settings, judge_model="")  # its own name is found again
    with contextlib.ExitStack() as stack:
        url = settings.judge_url
        if rank == 0 and not url:
            url = stack.enter_context(embedded_server())
        judge = stack.enter_context(contextlib.closing(Judge(settings, broadcast(url), key)))
        if rank == 0:
            print(judge.preflight(), flush=True)
        judge.way = broadcast(judge.way)
        if settings.rubric and judge.mode == "rm":
            raise UserError("--rubric: a reward model reads none; name a chat judge by --judge-url")
        yield judge
