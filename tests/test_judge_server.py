"""The embedded judge: its numbers are the heads on the base's own hidden states, alone and in a
crowd; refitting gives the shipped heads; bad requests and dying parents."""

import concurrent.futures
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import helpers
import pytest
import requests
import runs
import torch
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM

import cli
import judge_heads
import judge_server

ROOT = Path(judge_server.__file__).parent
READS = {"score": [(1, None)], "agreed": [(1, 2)]}
CASE = "Dilemma: One well is left. Who gets the water?\nRosa: You farm."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model in the place of the base, and two random heads."""
    made = tmp_path_factory.mktemp("judge")
    runs.saved_model(made / "base")
    torch.manual_seed(1)
    heads = {"score": torch.randn(65), "agreed": torch.randn(65)}
    save_file(heads, made / "heads.safetensors", metadata={"reads": json.dumps(READS)})
    return made


class Served:
    """An Engine behind real HTTP, in this process."""

    def __init__(self):
        self.http = judge_server.Server(("127.0.0.1", 0), judge_server.Handler)
        self.engine = self.http.engine = judge_server.Engine()
        self.root = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=[0.02], daemon=True).start()

    def post(self, path="/pooling", **body):
        return requests.post(self.root + path, json=body, timeout=60)

    def score(self, case, text, model=None):
        model = model or self.engine.name
        messages = [{"role": "user", "content": case}, {"role": "assistant", "content": text}]
        return self.post(model=model, messages=messages)

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def served(folder, monkeypatch):
    monkeypatch.setattr(judge_heads, "default_model_folder", lambda: folder / "base")
    monkeypatch.setattr(judge_heads, "HEADS", folder / "heads.safetensors")
    monkeypatch.setattr(judge_heads, "compute_dtype", lambda *name: torch.float32)
    made = Served()
    yield made
    made.close()


def by_hand(folder, case, text, head):
    """The head on the mean of the plain model's hidden states after its first block."""
    tokenizer = helpers.tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    before = tokenizer(case + "\n\n", add_special_tokens=False)["input_ids"]
    judged = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    states = model(torch.tensor([before + judged]), output_hidden_states=True).hidden_states[1][0]
    weights = load_file(folder / "heads.safetensors")[head]
    read = states[len(before) :][: READS[head][0][1]]
    return float(read.mean(0).detach() @ weights[:-1] + weights[-1])


def test_the_judge_takes_the_last_card(monkeypatch):
    """One that no rank has, or that of the rank that does not write the run's folder."""
    for cards, place in ((0, "cpu"), (1, "cuda:0"), (8, "cuda:7")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda cards=cards: cards)
        assert judge_heads.judge_device() == torch.device(place)


TEXTS = [
    "We share the water.",
    "No.",
    "The farm gets it by day, the hospital by night, and they talk again in May.",
    "Half<|im_end|>",
]


def test_a_score_is_the_head_on_the_mean_hidden_state(served, folder):
    for text in TEXTS:
        for head, name in (
            ("score", served.engine.name),
            ("agreed", served.engine.name + ":agreed"),
        ):
            got = served.score(CASE, text, name).json()["data"][0]["data"]
            wanted = by_hand(folder, CASE, text, head)
            assert got == [
                pytest.approx(min(5, max(0, wanted)) if head == "score" else wanted, abs=1e-4)
            ]


def test_concurrent_requests_get_the_answers_that_they_get_alone(served):
    jobs = [(CASE + " More." * i, text) for i in range(6) for text in TEXTS]
    alone = [served.score(*job).json()["data"][0]["data"][0] for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda job: served.score(*job).json()["data"][0]["data"][0], jobs))
    assert together == alone  # bit by bit: each is read by itself


def test_damaged_heads_are_told_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(judge_heads, "HEADS", tmp_path / "heads.safetensors")
    with pytest.raises(cli.UserError, match="cannot be read .*; put it back, or name a"):
        judge_server.Engine()
    with pytest.raises(cli.UserError, match="cannot be read .*, or run .*judge_server.py fit"):
        judge_heads.load_heads()
    head = {"score": torch.ones(65)}
    for damaged in (b"half", save(head), save(head, {"reads": "no JSON"})):
        judge_heads.HEADS.write_bytes(damaged)
        with pytest.raises(cli.UserError, match="cannot be read .*, or run .*judge_server.py fit"):
            judge_server.Engine()


def test_a_port_that_is_taken_is_told(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for port in (taken.getsockname()[1], 70000):
            monkeypatch.setattr(sys, "argv", ["judge_server.py", "--port", str(port)])
            with pytest.raises(cli.UserError, match=f"^--port {port}: "):
                judge_server.main()


def test_an_empty_text_has_a_score_too(served):
    assert isinstance(served.score(CASE, "").json()["data"][0]["data"][0], float)


def test_a_case_is_read_once_for_all_questions_about_it(folder, served):
    """The turns between case and judged text are read, and of that only what the head is of."""
    said, last = "Rosa: We dig.\nMina:", "Agreed, on Monday, and the well stays open."
    messages = [{"role": "user", "content": text} for text in (CASE, said, last)]
    agreed = served.post(model=served.engine.name + ":agreed", messages=messages)
    assert served.score(CASE, "We share.").status_code == 200
    assert served.engine.base.read_case.cache_info().misses == 1
    (found,) = agreed.json()["data"]
    expected = by_hand(folder, f"{CASE}\n\n{said}", last, "agreed")
    assert found["data"][0] == pytest.approx(expected, abs=1e-4)
    messages[1]["content"] = "Rosa: We never dig.\nMina:"
    other = served.post(model=served.engine.name + ":agreed", messages=messages)
    assert abs(other.json()["data"][0]["data"][0] - expected) > 1e-3


@pytest.mark.slow
@pytest.mark.skipif("REFIT" not in os.environ, reason="several minutes; REFIT=1 runs it")
def test_refitting_gives_the_shipped_heads(tmp_path, monkeypatch):
    """One head, to rounding: the shipped ones were fitted in bf16."""
    shipped = load_file(judge_heads.HEADS)["agreed"]
    agreed = judge_heads.examples()["agreed"]
    monkeypatch.setattr(judge_heads, "examples", lambda: {"agreed": agreed})
    monkeypatch.setattr(judge_heads, "HEADS", tmp_path / "heads.safetensors")
    judge_heads.fit()
    refitted = load_file(tmp_path / "heads.safetensors")["agreed"]
    assert torch.cosine_similarity(refitted, shipped, dim=0) > 0.99


def test_ridge_finds_the_line_that_the_labels_lie_on():
    features = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    line = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)  # the last one: the constant
    values = judge_heads.apply(line, features)
    values[0] += 100  # and counts next to nothing
    counts = torch.ones(50, dtype=torch.float64)
    counts[0] = 1e-9
    weights = judge_heads.ridge(features, values, counts, penalty=1e-6)
    torch.testing.assert_close(weights, line, rtol=0, atol=1e-4)


BAD = [
    {},
    {"messages": []},
    {"messages": "x"},
    {"messages": ["x"]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"content": 3}]},
    {"messages": {"content": "x"}},
    {"input": "x"},
]


def test_bad_requests_get_an_answer_in_the_openai_shape_and_the_server_lives(served):
    for body in BAD:
        reply = served.post(**body)
        assert reply.status_code == 400 and reply.json()["error"]["code"] == 400, body
    for data in (
        b"{",
        b"\xff",
        b"[1]",
        b'"x"',
        b"[" * 50000,
        b'{"messages": [{"content": "half of \\ud83d"}]}',
    ):
        assert requests.post(served.root + "/pooling", data=data, timeout=20).status_code == 400
    assert (
        served.score(CASE, "x", "gpt-9").status_code == 404 == served.post("/nothing").status_code
    )
    assert requests.get(served.root + "/nothing", timeout=20).status_code == 404
    with requests.Session() as kept:  # what is refused is read all the same: the next one is served
        replies = [kept.post(f"{served.root}/{path}", json=BAD[1]) for path in ("no", "pooling")]
        assert [reply.status_code for reply in replies] == [404, 400]
        assert "error" in replies[1].json()
    for size in (b"", b"Content-Length: x\r\n", b"Content-Length: -1\r\n"):
        with socket.create_connection(served.http.server_address) as one:
            one.sendall(b"POST /pooling HTTP/1.1\r\n" + size + b"\r\n")
            one.shutdown(socket.SHUT_WR)
            assert one.recv(12) == b"HTTP/1.1 400"
    listed = requests.get(served.root + "/v1/models", timeout=20).json()["data"]
    assert [m["id"] for m in listed] == [served.engine.name, served.engine.name + ":agreed"]
    assert served.engine.name == "negotiation-judge-" + judge_heads.heads_digest()
    assert served.score(CASE, "We share.").status_code == 200


def test_a_failure_in_the_model_is_a_500_and_the_next_request_is_served(served):
    features = served.engine.base.features

    def broken(*question):
        served.engine.base.features = features
        raise RuntimeError("out of memory")

    served.engine.base.features = broken
    first, second = served.score(CASE, "One"), served.score(CASE, "One")
    assert first.status_code == 500 and "out of memory" in first.json()["error"]["message"]
    assert second.status_code == 200


def test_clients_that_hang_up_leave_no_traceback_and_a_fault_of_ours_does(
    served, monkeypatch, capfd
):
    before = threading.active_count()
    for request in [
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"POST /pooling HTTP/1.1\r\nContent-Length: 99\r\n\r\n{",
        b"GET",
    ] * 5:
        with socket.create_connection(served.http.server_address) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
            one.sendall(request)
    requests.get(served.root + "/v1/models", timeout=20)
    ends = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < ends:
        time.sleep(0.01)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(judge_server.Handler, "question", lambda handler: 1 / 0)
    with pytest.raises(requests.ConnectionError):
        served.score(CASE, "x")
    assert "ZeroDivisionError" in capfd.readouterr().err


def alive(pid):
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return "zombie" not in status and os.kill(pid, 0) is None
    except (OSError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("how", ["close", signal.SIGKILL, signal.SIGINT])
def test_the_embedded_judge_ends_with_its_parent(how):
    # A shell's background process ignores SIGINT.
    ours = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = (
        f"import reward, signal; {ours}\n"
        "with reward.embedded_server() as url: print(url, flush=True); input()"
    )
    pipe = subprocess.PIPE
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=pipe,
        stdout=pipe,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    url = parent.stdout.readline().strip()
    (child,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert alive(int(child)) and requests.get(url + "/models", timeout=20).status_code == 200
    if how == "close":
        parent.communicate("\n", timeout=30)
    else:
        parent.send_signal(how)
        parent.wait(20)
    ends = time.monotonic() + 10
    while alive(int(child)) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not alive(int(child))
