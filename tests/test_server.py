"""The embedded judge's server: its numbers are the model's own, alone and among many requests; bad requests and dying parents."""
import concurrent.futures
import gc
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
import torch

import helpers  # puts the repository on the path
import cli
import model as lm
import server

ROOT = Path(server.__file__).parent


class Served:
    """An Engine with a tiny random model behind real HTTP, in this process."""

    def __init__(self, kind="llama", monkeypatch=None):
        monkeypatch.setattr(server, "load", lambda name, **more: (helpers.tiny(kind), helpers.tokenizer()))
        self.kind, self.http = kind, server.Server(("127.0.0.1", 0), server.Handler)
        self.engine = self.http.engine = server.Engine("tiny", 1)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=[0.02], daemon=True).start()

    def post(self, path, **body):
        return requests.post(self.url + path, json=body, timeout=60)


@pytest.fixture(params=["llama", "gemma3"])
def served(request, monkeypatch):
    """llama, and a model with sliding windows."""
    server = Served(request.param, monkeypatch)
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_echoed_log_probs_are_the_model_s_own(served):
    text, tails = "We share the water between the farm and the hospital. " * 3 + "I propose a plan", [" that is fair.", " that is unfair!", " x"]
    reply = served.post("/completions", prompt=[text + t for t in tails], echo=True, max_tokens=0, logprobs=1).json()
    plain = helpers.tiny(served.kind)
    for choice, tail in zip(reply["choices"], tails):
        ids = helpers.tokenizer()(text + tail)["input_ids"]
        expected = helpers.plain_logprobs(plain, ids)
        got = choice["logprobs"]["token_logprobs"]
        assert got[0] is None and torch.allclose(torch.tensor(got[1:]), expected, atol=1e-4)
        assert "".join(choice["logprobs"]["tokens"]) == text + tail == choice["text"] and len(choice["logprobs"]["text_offset"]) == len(ids)
    for _ in range(2):  # with a beginning that is already in the cache, and only the numbers that are wanted
        part = served.post("/completions", prompt=[text + t for t in tails], echo=True, max_tokens=1, logprobs=1, logprobs_from=len(text)).json()
        for choice, whole in zip(part["choices"], reply["choices"]):
            a, b = choice["logprobs"]["token_logprobs"], whole["logprobs"]["token_logprobs"]
            n = next(i for i, offset in enumerate(choice["logprobs"]["text_offset"]) if offset >= len(text))
            assert a[:n] == [None] * n and a[n:] == pytest.approx(b[n:], abs=1e-4)


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_packed_weights_stay_packed_and_say_the_same(dtype, close, monkeypatch):
    if not (torch.backends.mkldnn.is_available() and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())):
        pytest.skip("this machine packs nothing")
    plain = helpers.tiny("llama").to(dtype)
    monkeypatch.setattr(server, "load", lambda name, **more: (helpers.tiny("llama").to(dtype), helpers.tokenizer()))
    engine = server.Engine("tiny", 1)
    gc.collect()
    layers = [m for m in engine.model.modules() if isinstance(m, torch.nn.Linear)]
    assert layers and all("forward" in vars(m) and m.weight.numel() == 0 for m in layers)
    ids = list(range(5, 45))
    scores, _ = engine.do(server.Work([ids], [1]))
    assert scores[0] == pytest.approx(helpers.plain_logprobs(plain.float(), ids).tolist(), abs=close)


def test_chat_samples_what_the_model_says_and_reports_it(served):
    ask = dict(messages=[{"role": "user", "content": "Who gets the water?"}], max_tokens=12, logprobs=True, top_logprobs=3)
    greedy = served.post("/chat/completions", temperature=0, **ask).json()["choices"][0]
    prompt = helpers.tokenizer().apply_chat_template(ask["messages"], add_generation_prompt=True, return_dict=True)["input_ids"]
    plain, ids, end = helpers.tiny(served.kind).requires_grad_(False), list(prompt), helpers.tokenizer().eos_token_id
    plain.set_attn_implementation("eager")
    for said in greedy["logprobs"]["content"]:
        logp = plain(torch.tensor([ids])).logits[0, -1].float().log_softmax(0)
        token = int(logp.argmax())
        assert said["logprob"] == pytest.approx(float(logp[token]), abs=1e-4) and said["token"] == helpers.tokenizer().decode([token])
        assert [t["logprob"] for t in said["top_logprobs"]] == pytest.approx(logp.topk(3).values.tolist(), abs=1e-4)
        ids.append(token)
    assert greedy["finish_reason"] == ("stop" if ids[-1] == end else "length") and (ids[-1] == end or len(ids) == len(prompt) + 12)
    several = served.post("/chat/completions", n=5, seed=7, temperature=1.5, **ask).json()
    texts = [c["message"]["content"] for c in several["choices"]]
    assert len(texts) == 5 and len(set(texts)) > 1 and several["usage"]["prompt_tokens"] == len(prompt)
    assert several["usage"]["completion_tokens"] == sum(len(c["logprobs"]["content"]) for c in several["choices"])
    again = served.post("/chat/completions", n=5, seed=7, temperature=1.5, **ask).json()
    assert [c["message"]["content"] for c in again["choices"]] == texts
    full = greedy["message"]["content"]
    cut = served.post("/chat/completions", temperature=0, stop=full[3:5], **ask).json()["choices"][0]
    assert cut["message"]["content"] == full[:full.find(full[3:5])] and cut["finish_reason"] == "stop"


def test_concurrent_requests_get_the_answers_that_they_get_alone(served):
    chats = [dict(messages=[{"role": "user", "content": f"Question {i}"}], max_tokens=4 + i, temperature=0) for i in range(6)]
    prompts = [dict(prompt=[f"Text {i % 2} and {i}" + t for t in (" yes", " no")], echo=True, max_tokens=0) for i in range(6)]
    jobs = [("/chat/completions", c) for c in chats] + [("/completions", p) for p in prompts]
    alone = [served.post(path, **body).json()["choices"] for path, body in jobs]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda job: served.post(job[0], **job[1]).json()["choices"], jobs * 2))
    for a, b in zip(alone * 2, together):
        if "message" in a[0]:
            assert a[0]["message"] == b[0]["message"]
        else:
            assert all(x["logprobs"]["token_logprobs"][1:] == pytest.approx(y["logprobs"]["token_logprobs"][1:], abs=1e-4) for x, y in zip(a, b))


BAD = [("/completions", dict(prompt="a b")), ("/completions", dict(echo=True, max_tokens=0)),
       ("/completions", dict(prompt=[], echo=True, max_tokens=0)), ("/completions", dict(prompt=[1], echo=True, max_tokens=0)),
       ("/completions", dict(prompt="", echo=True, max_tokens=0)), ("/completions", dict(prompt="x", echo="yes")), ("/chat/completions", dict()),
       ("/chat/completions", dict(messages=[])), ("/chat/completions", dict(messages=["x"])),
       ("/chat/completions", dict(messages=[{"role": "user"}])), ("/chat/completions", dict(messages=[{"role": "user", "content": 3}]))]
BAD += [("/chat/completions", dict(messages=[{"role": "user", "content": "x"}], **wrong)) for wrong in (
    dict(max_tokens=0), dict(max_tokens=-1), dict(max_tokens="5"), dict(max_tokens=True), dict(max_tokens=99999), dict(temperature=-1),
    dict(temperature="hot"), dict(n=0), dict(n=99), dict(seed="x"), dict(top_logprobs=21), dict(logprobs=1), dict(stop=[3]),
    dict(stop=""), dict(stream=True), dict(top_p=0.5))]
BAD += [("/chat/completions", dict(messages=[{"role": "user", "content": "water " * 2000}]))]


def test_bad_requests_get_a_400_in_the_openai_shape_and_the_server_lives(monkeypatch):
    served = Served("llama", monkeypatch)
    for path, body in BAD:
        reply = served.post(path, **body)
        assert reply.status_code == 400 and set(reply.json()["error"]) == {"message", "type", "param", "code"}, (path, str(body)[:80])
    for data in (b"{", b"\xff", b"[1]", b'"x"', b"[" * 50000, b'{"prompt": "half of \\ud83d"}'):
        assert requests.post(served.url + "/completions", data=data, timeout=20).status_code == 400
    assert served.post("/chat/completions", model="gpt-9", messages=[{"role": "user", "content": "x"}]).status_code == 404
    assert requests.get(served.url + "/nothing", timeout=20).status_code == 404 == served.post("/nothing").status_code
    assert requests.post(served.url + "/completions", data=b"x" * (server.LONGEST_REQUEST + 1), timeout=20).status_code == 413
    entry = requests.get(served.url + "/models", timeout=20).json()["data"][0]
    assert entry["id"] == "tiny" and entry["frame"] == ["<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"]
    assert served.post("/chat/completions", messages=[{"role": "user", "content": "x"}], max_tokens=1).status_code == 200
    served.http.shutdown()
    served.http.server_close()


def test_a_beginning_that_many_prompts_share_is_read_once(served, monkeypatch):
    """The rubric before each case, say; also when there are more prompts than rows are kept for."""
    fed, read = [], lm.RaggedCache.read
    monkeypatch.setattr(lm.RaggedCache, "read", lambda cache, model, rows, tokens: fed.extend(map(len, tokens)) or read(cache, model, rows, tokens))
    rubric, cases = "We share the water between the farm and the hospital. " * 6, [f" Case {n}: {n * 'x'} the plan" for n in range(3 * server.Engine.KEPT)]
    for case in cases:
        served.post("/completions", prompt=[rubric + case + " is fair.", rubric + case + " is not."], echo=True, max_tokens=1, logprobs=1,
                    logprobs_from=len(rubric + case)).raise_for_status()
    count = lambda text: len(helpers.tokenizer()(text)["input_ids"])
    assert count(rubric) < sum(fed) < count(rubric) + sum(count(case + " is fair.") + count(" is not.") + 4 for case in cases)


def test_a_full_queue_answers_429_with_retry_after(monkeypatch):
    monkeypatch.setattr(server.Engine, "WAITING", 2)
    served = Served("llama", monkeypatch)
    gate = threading.Event()
    monkeypatch.setattr(served.engine, "_score", lambda work: gate.wait(20) and [[-1.0]] * len(work.prompts))
    ask = lambda _: served.post("/completions", prompt="We share the water", echo=True, max_tokens=0)
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        first = pool.submit(ask, 0)
        while not served.engine.queue.empty() or not first.running():
            time.sleep(0.01)
        time.sleep(0.2)
        futures = [pool.submit(ask, i) for i in range(5)]
        refused = [f for f in futures if f in concurrent.futures.wait(futures, timeout=2).done]
        assert len(refused) == 3 and all(f.result().status_code == 429 and f.result().headers["Retry-After"] == "1" for f in refused)
        gate.set()
        assert [f.result().status_code for f in [first, *futures]].count(200) == 3
    served.http.shutdown()
    served.http.server_close()


def test_a_failure_in_the_model_is_a_500_and_the_next_request_is_served(monkeypatch):
    served = Served("llama", monkeypatch)
    read = served.engine.cache.read

    def broken(*args):
        served.engine.cache.read = read
        raise RuntimeError("out of memory")
    served.engine.cache.read = broken
    text = "We share the water between the farm"
    ask = dict(prompt=[text + " now", text + " and"], echo=True, max_tokens=0, logprobs_from=len(text))
    first, second = served.post("/completions", **ask), served.post("/completions", **ask)
    assert first.status_code == 500 and "out of memory" in first.json()["error"]["message"] and second.status_code == 200
    fresh = helpers.plain_logprobs(helpers.tiny("llama"), helpers.tokenizer()(text + " now")["input_ids"])
    got = [n for n in second.json()["choices"][0]["logprobs"]["token_logprobs"] if n is not None]
    assert got == pytest.approx(fresh.tolist()[-len(got):], abs=1e-4)
    served.http.shutdown()
    served.http.server_close()


def test_clients_that_hang_up_leave_no_traceback_and_a_fault_of_ours_does(monkeypatch, capfd):
    served = Served(monkeypatch=monkeypatch)
    before = threading.active_count()
    for request in [b"GET /v1/models HTTP/1.1\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n{", b"GET"] * 5:
        with socket.create_connection(("127.0.0.1", served.http.server_address[1])) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not a farewell
            one.sendall(request)
    requests.get(served.url + "/models", timeout=20)  # all that came before it are at work, or done
    ends = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < ends:
        time.sleep(0.01)
    assert capfd.readouterr().err == ""
    served.engine.models = lambda: 1 / 0
    with pytest.raises(requests.ConnectionError):
        requests.get(served.url + "/models", timeout=20)
    assert "ZeroDivisionError" in capfd.readouterr().err
    served.http.shutdown()
    served.http.server_close()


def alive(pid):
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text() and bool(os.kill(pid, 0) is None)
    except (OSError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    made = helpers.tiny("llama")
    lm.save(made.config, made.generation_config, helpers.tokenizer(), lm.plain_state(made), folder)
    return str(folder)


def test_the_embedded_judge_starts_answers_and_ends(small_folder):
    served = server.start_embedded(small_folder)
    assert requests.get(served.url + "/models", timeout=20).json()["data"][0]["id"] == small_folder
    served.close()
    assert served.process.returncode == 0
    with pytest.raises(cli.UserError, match="did not start"):
        server.start_embedded("/no/such/folder")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_embedded_judge_dies_with_its_parent(small_folder, how):
    ours = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # where the tests run in a shell's background it is ignored, and that is inherited
    code = f"import server, signal, time; {ours}; s = server.start_embedded({small_folder!r}); print(s.process.pid, flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.send_signal(how)
    parent.wait(20)
    ends = time.monotonic() + 10
    while alive(child) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not alive(child)
    parent.stdout.close()
