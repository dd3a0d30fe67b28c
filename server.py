"""The embedded judge's server: one language model behind the part of the OpenAI API that the judge asks for.

    GET /v1/models, POST /v1/completions (echo with log-probs), POST /v1/chat/completions;   python reward.py serve --port 8000 [--model M]

One thread per connection, one worker for the model. Prompts that begin alike, as a rubric's do, are read once, and what waits is batched.
Left out on purpose: streaming, tools, sampling through /completions.
"""
import concurrent.futures
import dataclasses
import http.server
import json
import math
import os
import queue
import random
import subprocess
import sys
import threading
import time

import jinja2
import torch
from torch.nn import functional as F

from cli import UserError, command_line, option, run_cli
from model import RaggedCache, context_limit, load, own_device, packed, project

LONGEST_REQUEST = 1 << 20  # bytes of a request's body
USABLE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2  # a scheduler may have given us some cores only
CORES = max(1, USABLE // 2)  # that the embedded judge computes on
BARE_FRAME = ["", "\n\n"]  # what stands around a text where a model has no chat template


class Refuse(Exception):
    """A request that is answered with an error: status, message."""


@dataclasses.dataclass
class Work:
    """A request on its way to the model."""
    prompts: list  # of lists of ids
    first: list  # scoring: per prompt, index (at least 1) of the first token whose log-prob is wanted
    limit: int = 0  # writing: tokens to sample
    copies: int = 1
    temperature: float = 1.0
    seed: int = 0
    stop: list = ()
    top: int = 0  # alternatives to report beside each sampled token
    future: concurrent.futures.Future = dataclasses.field(default_factory=concurrent.futures.Future)


class Line:
    """One completion while it is written: `logits` (V,) are those of its next token."""

    def __init__(self, work, row, logits, seed):
        self.work, self.row, self.logits, self.rng = work, row, logits, random.Random(seed)
        self.ids, self.numbers, self.best, self.text, self.finish = [], [], [], "", None

    def draw(self, tokenizer, ends):
        """Draw one token by inverse CDF, and see whether the text ends there."""
        logp = self.logits.log_softmax(0)
        greedy = self.work.temperature < 1e-3
        cdf = (self.logits / (1.0 if greedy else self.work.temperature)).softmax(0).cumsum(0)
        drawn = int(torch.searchsorted(cdf, self.rng.random() * float(cdf[-1]), right=True))
        token = int(logp.argmax()) if greedy else min(drawn, len(cdf) - 1)
        self.ids.append(token)
        self.numbers.append(float(logp[token]))
        self.best.append(list(zip(*(x.tolist() for x in logp.topk(self.work.top)))))  # [(log-prob, id), ...]
        self.text = tokenizer.decode(self.ids, skip_special_tokens=True)
        cut = min((self.text.find(s) for s in self.work.stop if s in self.text), default=None)
        self.text = self.text[:cut]
        self.finish = "stop" if token in ends or cut is not None else "length" if len(self.ids) == self.work.limit else None


class Engine:
    """The served model and its one worker. Prompts read lately stay in the cache: a beginning that is shared is read once."""
    KEPT, SCRATCH, WAITING = 8, 8, 64  # rows for prompts, rows for what follows them, requests that may wait

    def __init__(self, name, threads):
        self.name, self.threads, self.lock, self.queue = name, threads, threading.Lock(), queue.Queue(self.WAITING)
        self.model, self.tokenizer = load(name, device=own_device())
        head = self.model.get_output_embeddings()  # computed in fp32, because bf16 log-odds are visibly quantised
        sharp = torch.nn.Linear(head.in_features, head.out_features, head.bias is not None, device=head.weight.device)
        sharp.load_state_dict(head.state_dict())
        sharp.register_forward_pre_hook(lambda module, given: (given[0].float(),))
        self.model.set_output_embeddings(sharp)
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        self.ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id}
        self.fast = packed(self.model)  # for good, as these weights never change; it is held, because one that nobody holds ends at once
        self.fast.__enter__()
        for m in self.model.modules():
            if "forward" in vars(m):
                m.weight.data = m.weight.data.new_empty(0)  # in its old order nothing reads it any more
        for p in self.model.parameters():
            p.data = p.data.clone()  # out of the mapped file, which goes with that
        self.cache, self.held, self.used = RaggedCache(self.KEPT + self.SCRATCH), [[] for _ in range(self.KEPT)], [0] * self.KEPT
        threading.Thread(target=self._serve, daemon=True).start()

    def do(self, work):
        """Queue a request and wait for it: (log-probs per prompt, Lines)."""
        longest = max(map(len, work.prompts)) + work.limit
        if not min(map(len, work.prompts)) or longest > context_limit(self.model):
            raise Refuse(400, f"{longest} tokens: the model reads at least 1 and at most {context_limit(self.model)}")
        try:
            self.queue.put_nowait(work)
        except queue.Full:
            raise Refuse(429, "too many requests are waiting") from None
        return work.future.result()

    @torch.inference_mode()
    def _serve(self):
        torch.set_num_threads(self.threads)
        while True:
            batch = [self.queue.get()]
            while len(batch) < self.SCRATCH and not self.queue.empty():
                batch.append(self.queue.get())
            try:
                scores = [self._score(work) if work.first else None for work in batch]
                lines = self._write([(work, c) for work in batch if work.limit for c in range(work.copies)])
                for work, score in zip(batch, scores):
                    work.future.set_result((score, [line for line in lines if line.work is work]))
            except RuntimeError as error:  # out of memory, say: these requests fail, the server lives
                for work in batch:
                    if not work.future.done():
                        work.future.set_exception(Refuse(500, str(error)[:200]))

    def _read(self, ids):
        """Have `ids` in a row of the cache; only what no kept row begins with is read. Returns (row, state (H,) after the last id)."""
        common = lambda row: next((i for i, (a, b) in enumerate(zip(self.held[row], ids)) if a != b), min(len(self.held[row]), len(ids)))
        best = max(range(self.KEPT), key=common)
        n, row = min(common(best), len(ids) - 1), min(range(self.KEPT), key=self.used.__getitem__)  # the row unused for longest
        if row != best and n:
            self.cache.copy(best, [row], n)
        self.cache.lengths[row], self.held[row] = n, ids[:n]
        self.used[best] = self.used[row] = max(self.used) + 1
        state = self.cache.read(self.model, [row], [ids[n:]])[0, -1]
        self.held[row] = ids
        return row, state

    def _score(self, work):
        """Per prompt, the log-probs of its tokens from index `first` on: the common beginning once, then the ends in batches."""
        differ = (i for i in range(min(map(len, work.prompts))) if len({p[i] for p in work.prompts}) > 1)
        shared = next(differ, min(map(len, work.prompts)))
        if not shared:
            return [self._score(Work([p], [first]))[0] for p, first in zip(work.prompts, work.first)]
        begin = min(*work.first, shared)  # nothing is asked of what stands before
        row, state = self._read(work.prompts[0][:begin])
        trunk, states = work.prompts[0][begin:shared], state[None]  # states (n + 1, H) predict the n tokens of the trunk and what follows
        if trunk:
            states = torch.cat([states, self.cache.read(self.model, [row], [trunk])[0]])
            self.held[row] = work.prompts[0][:shared]
        ends, after = [p[shared:] for p in work.prompts], [states[:-1]]
        for at in range(0, len(ends), self.SCRATCH):
            some = [end for end in ends[at:at + self.SCRATCH] if end]
            rows = list(range(self.KEPT, self.KEPT + len(some)))
            self.cache.copy(row, rows, shared)
            read = self.cache.read(self.model, rows, some) if some else []
            after += [torch.cat([states[-1:], more[:len(end) - 1]]) for end, more in zip(some, read)]
        target = torch.tensor(trunk + sum(ends, []), device=state.device)
        parts = zip(torch.cat(after).split(256), target.split(256))  # the vocabulary in pieces: a long echo fits in memory
        numbers = torch.cat([-F.cross_entropy(project(self.model, h), t, reduction="none") for h, t in parts]).tolist()
        numbers, own = numbers[:len(trunk)], iter(numbers[len(trunk):])
        return [(numbers + [next(own) for _ in end])[first - begin:] for end, first in zip(ends, work.first)]

    def _write(self, wanted):
        """Write completions for (work, number): all in one decoding batch, which whoever is done leaves."""
        lines = []
        for at in range(0, len(wanted), self.SCRATCH):
            live = []
            for row, (work, n) in enumerate(wanted[at:at + self.SCRATCH], self.KEPT):
                read, state = self._read(work.prompts[0])
                self.cache.copy(read, [row], len(work.prompts[0]))
                live.append(Line(work, row, project(self.model, state[None])[0], f"{work.seed} {n}"))
            lines += live
            while live:
                for line in live:
                    line.draw(self.tokenizer, self.ends)
                by_row = {line.row: line for line in live if not line.finish}
                live = [by_row[row] for row in self.cache.together(list(by_row))]
                logits = self.cache.feed(self.model, [x.row for x in live], [x.ids[-1:] for x in live]) if live else []
                for line, new in zip(live, logits):
                    line.logits = new
        return lines

    # -- requests and replies in the OpenAI shape; `ask(name, types, default, low, high)` is a checked field of the request

    def models(self):
        """GET /v1/models, with what our own client wants to know: the chat template around a text, and that we know `logprobs_from`."""
        frame = BARE_FRAME
        if self.tokenizer.chat_template:
            message = [{"role": "user", "content": "Content"}]
            frame = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True).split("Content")
        entry = {"id": self.name, "object": "model", "created": 0, "owned_by": "local", "frame": frame, "logprobs_from": True}
        return {"object": "list", "data": [entry]}

    def complete(self, ask):
        """POST /v1/completions with `echo`: log-probs of the prompt's tokens, from character `logprobs_from` (an addition of ours) on."""
        prompts, since = ask("prompt", (str, list)), ask("logprobs_from", (int,), 0)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not ask("echo", (bool,), False) or ask("max_tokens", (int,), 16, 0) > 1:
            raise Refuse(400, "only echo with max_tokens 0 or 1 is served here (and nothing is sampled); to sample use /v1/chat/completions")
        if not 0 < len(prompts) <= 64 or not all(isinstance(p, str) for p in prompts):
            raise Refuse(400, "prompt must be a text, or a list of at most 64 texts")
        with self.lock:
            read = [self.tokenizer(p, add_special_tokens=False, return_offsets_mapping=True) for p in prompts]
        ids, starts = [r["input_ids"] for r in read], [[a for a, _ in r["offset_mapping"]] for r in read]
        if min(map(len, ids)) < 2:
            raise Refuse(400, "each prompt must have at least two tokens")
        first = [min(max(1, sum(a < since for a in s)), len(s) - 1) for s in starts]
        scores, _ = self.do(Work(ids, first))
        choices = [{"index": i, "text": text, "finish_reason": "length", "logprobs": {
            "tokens": [self.tokenizer.decode([t]) for t in ids[i]], "token_logprobs": [None] * first[i] + scores[i], "text_offset": starts[i]}}
            for i, text in enumerate(prompts)]
        return self._reply("text_completion", choices, ids, [])

    def chat(self, ask):
        """POST /v1/chat/completions."""
        messages = ask("messages", (list,))
        if not messages or not all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages):
            raise Refuse(400, "messages must be a list of {role, content}, both texts")
        try:
            with self.lock:
                ids = [self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]]
        except (jinja2.TemplateError, ValueError) as error:
            raise Refuse(400, f"the model's chat template refuses these messages ({error})") from None
        stop, shown = ask("stop", (str, list), []), ask("logprobs", (bool,), False)
        stop = [stop] if isinstance(stop, str) else stop
        if not all(isinstance(s, str) and s for s in stop) or ask("top_p", (int, float), 1) != 1 or ask("stream", (bool,), False):
            raise Refuse(400, "stop must be texts; top_p and stream are not supported")
        heat, seed = ask("temperature", (int, float), 1, 0, 10), ask("seed", (int,), random.getrandbits(32))
        top = ask("top_logprobs", (int,), 0, 0, 20)
        _, lines = self.do(Work(ids, (), ask("max_tokens", (int,), 256, 1, 2048), ask("n", (int,), 1, 1, 16), heat, seed, stop, top))

        def entry(number, token):
            text = self.tokenizer.decode([token])
            return {"token": text, "logprob": number, "bytes": list(text.encode())}
        said = lambda x: [{**entry(n, t), "top_logprobs": [entry(*b) for b in best]} for t, n, best in zip(x.ids, x.numbers, x.best)]
        choices = [{"index": i, "message": {"role": "assistant", "content": x.text}, "finish_reason": x.finish,
                    "logprobs": {"content": said(x)} if shown else None} for i, x in enumerate(lines)]
        return self._reply("chat.completion", choices, ids, lines)

    def _reply(self, kind, choices, ids, lines):
        read, new = sum(map(len, ids)), sum(len(x.ids) for x in lines)
        return {"id": f"{kind}-{time.monotonic_ns()}", "object": kind, "created": int(time.time()), "model": self.name, "choices": choices,
                "usage": {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}}


class Handler(http.server.BaseHTTPRequestHandler):
    """HTTP around `self.server.engine`."""
    protocol_version, timeout, disable_nagle_algorithm = "HTTP/1.1", 60, True
    log_message = lambda *args: None

    def do_GET(self):
        """GET /v1/models."""
        known = self.path.rstrip("/") == "/v1/models"
        self._send(200, self.server.engine.models()) if known else self._send(404, "unknown path")

    def do_POST(self):
        """POST /v1/completions and /v1/chat/completions."""
        engine, size = self.server.engine, self.headers.get("Content-Length", "")
        answer = {"/v1/chat/completions": engine.chat, "/v1/completions": engine.complete}.get(self.path.rstrip("/"))
        if not size.isdigit() or int(size) > LONGEST_REQUEST:
            self.close_connection = True
            return self._send(413 if size.isdigit() else 411, f"a Content-Length of at most {LONGEST_REQUEST} is needed")
        try:
            body = self._body(int(size))
            if not answer:
                raise Refuse(404, "unknown path")
            if not isinstance(body, dict):
                raise Refuse(400, "the body must be a JSON object")
            if body.get("model", engine.name) != engine.name:
                raise Refuse(404, f"the model {str(body['model'])[:80]} is not served here; {engine.name} is")

            def ask(name, types, default=None, low=-math.inf, high=math.inf):
                value = default if body.get(name) is None else body[name]
                if type(value) not in types or int in types and not low <= value <= high:
                    raise Refuse(400, f"{name} is missing, has a wrong type or is out of range")
                return value
            self._send(200, answer(ask))
        except Refuse as refusal:
            self._send(*refusal.args)

    def _body(self, size):
        try:
            body = json.loads(self.rfile.read(size))
            json.dumps(body, ensure_ascii=False).encode()  # no tokenizer takes half of a surrogate pair
            return body
        except (ValueError, RecursionError):
            raise Refuse(400, "the body is not JSON, or holds half a character")

    def _send(self, status, content):
        if status != 200:
            kind = "server_error" if status >= 500 else "invalid_request_error"
            content = {"error": {"message": content, "type": kind, "param": None, "code": status}}
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in [("Content-Type", "application/json"), ("Content-Length", str(len(data)))] + [("Retry-After", "1")] * (status == 429):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


class Server(http.server.ThreadingHTTPServer):
    """One thread per connection; all of them wait for the one worker of `engine`."""
    request_queue_size, engine = 128, None

    def handle_error(self, request, client_address):
        """Whoever asked has gone, or says nothing more: the connection ends, without a word. Anything else is a fault of ours, and is shown."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


@dataclasses.dataclass(frozen=True)
class ServeSettings:
    """python reward.py serve"""
    port: int = option(8000, "port (0: a free one)", low=0, high=65535)
    host: str = option("127.0.0.1", "address to listen on; anything but loopback lets others in")
    model: str = option("smollm2-135m", "model to serve: smollm2-135m, a folder or a Hugging Face id")
    threads: int = option(0, "CPU threads (0: half of the cores)", low=0)
    until_eof: bool = option(False, "end when standard input ends: so a parent takes its server along, whatever happens to it")


def serve(argv):
    """Serve a model until Ctrl-C, or until standard input ends."""
    settings = command_line(ServeSettings, argv, "reward.py serve")
    if settings.until_eof:
        threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
    try:
        server = Server((settings.host, settings.port), Handler)
    except OSError as error:
        raise UserError(f"--port {settings.port}: cannot listen on {settings.host} ({error.strerror}); choose another")
    server.engine = Engine(settings.model, settings.threads or CORES)
    print(f"serving {settings.model} at http://{settings.host}:{server.server_address[1]}/v1", flush=True)
    server.serve_forever()


class start_embedded:
    """The embedded judge as a child process: `.url`, `.close()`. Its standard input is a pipe that we hold, so it ends when we do, even
    by kill -9; and it has a session of its own, so that Ctrl-C reaches us alone. Raises UserError when it does not start."""

    def __init__(self, model="smollm2-135m", threads=0):
        command = [sys.executable, __file__, "--port", "0", "--model", model, "--threads", str(threads), "--until-eof"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.url = self.process.stdout.readline().rpartition(" ")[2].strip()
        if not self.url:
            self.close()
            raise UserError(f"--judge-model {model}: the embedded judge did not start (its own message stands above)")

    def close(self):
        """End the server and wait for it."""
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


if __name__ == "__main__":
    run_cli(lambda: serve(sys.argv[1:]))
