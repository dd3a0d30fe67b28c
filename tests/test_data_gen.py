"""data_gen.py: loading by seed, errors by line, what the checks catch, generating over HTTP."""

import collections
import http.server
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import client
import data_gen
import dataset
from cli import UserError
from data_gen import Memory
from dataset import DATA, load_jsonl, load_scenarios

ROOT = Path(data_gen.__file__).parent
PERSONAS = [{"name": "Ann", "creed": "You want this."}, {"name": "Bob", "creed": "You want that."}]


def refusal(call, *args):
    """What a call says when it refuses."""
    with pytest.raises(UserError) as error:
        call(*args)
    return str(error.value)


def write(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return str(path)


def row(n, **more):
    return {"id": f"d{n}", "tier": "everyday", "dilemma": f"Dilemma {n}?", **more}


# ---- loading ----------------------------------------------------------------------------------


def test_shipped_scenarios_deal_every_pair_and_order_evenly():
    scenarios = load_scenarios()
    assert len(scenarios) == len({s.id for s in scenarios}) == 320
    assert [s.id for s in scenarios] == [r["id"] for r in load_jsonl(DATA / "dilemmas.jsonl")]
    orders = collections.Counter(tuple(p["name"] for p in s.personas) for s in scenarios)
    assert len(orders) == 50 and set(orders.values()) <= {6, 7}
    shipped = {tuple(p["name"] for p in r["personas"]) for r in load_jsonl(DATA / "personas.jsonl")}
    assert all(pair in shipped or pair[::-1] in shipped for pair in orders)


def test_the_seed_decides_and_nothing_else():
    assert load_scenarios(seed=3) == load_scenarios(seed=3) != load_scenarios(seed=4)
    # another process with another hash seed: another rank
    code = "import dataset; print(repr(dataset.load_scenarios(seed=3)))"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert other.stdout == repr(load_scenarios(seed=3)) + "\n"


def test_a_file_with_personas_is_used_as_it_is(tmp_path):
    swapped = PERSONAS[::-1]
    lines = [row(1, personas=PERSONAS), "", row(2, personas=swapped, source="mine")]
    path = write(tmp_path / "own.jsonl", *lines)
    assert load_scenarios(path, seed=1) == load_scenarios(path, seed=2)
    assert load_scenarios(path) == [
        dataset.Scenario("d1", "everyday", "Dilemma 1?", tuple(PERSONAS)),
        dataset.Scenario("d2", "everyday", "Dilemma 2?", tuple(swapped)),
    ]


def test_dilemmas_without_personas_meet_shipped_pairs(tmp_path):
    """25 shipped pairs, each once in either order; a line with personas keeps its own."""
    path = write(tmp_path / "own.jsonl", *map(row, range(50)), row(50, personas=PERSONAS))
    *dealt, own = load_scenarios(path)
    assert len({scenario.personas[0]["name"] for scenario in dealt}) == 50
    assert own.personas == tuple(PERSONAS)


BAD_LINES = [
    (7, "a number instead of an object; write {...} with id, tier, dilemma"),
    ({"id": "x", "tier": "everyday"}, 'no "dilemma"; needed are id, tier, dilemma'),
    (row(2, dilemma=None), '"dilemma" is null instead of text; correct it'),
    (row(2, id=5), '"id" is a number instead of text; correct it'),
    (
        row(2, dilemma=" \n"),
        '"dilemma" is empty, or holds half a character; correct it or take the line out',
    ),
    (
        row(2, dilemma="\ud800"),
        '"dilemma" is empty, or holds half a character; correct it or take the line out',
    ),
    (row(1), 'id "d1" occurs twice; give every line an id of its own'),
]


@pytest.mark.parametrize("bad, says", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, bad, says):
    path = write(tmp_path / "bad.jsonl", row(1), bad)
    assert refusal(load_scenarios, path) == f"{path}:2: {says}"


@pytest.mark.parametrize("line", ['{"id": "x", "tier"', "[" * 99999])
def test_a_line_that_is_no_json_is_named(tmp_path, line):
    path = write(tmp_path / "bad.jsonl", row(1), line)
    assert refusal(load_scenarios, path).startswith(f"{path}:2: cannot be read (")


TWO = "instead of two; give two objects with a name and a creed"
BAD_PERSONAS = [
    (PERSONAS[:1], f'"personas" holds 1 {TWO}'),
    (PERSONAS + PERSONAS, f'"personas" holds 4 {TWO}'),
    ({"a": 1}, '"personas" is an object instead of a list; correct it'),
    ([PERSONAS[0], "Bob"], "persona 2: text instead of an object; write {...} with name, creed"),
    ([PERSONAS[0], {"name": "Bob"}], 'persona 2: no "creed"; needed are name, creed'),
    (
        [{"name": "", "creed": "You."}, PERSONAS[1]],
        'persona 1: "name" is empty, or holds half a character; correct it or take the line out',
    ),
    ([PERSONAS[0], PERSONAS[0]], "both personas have the same name; change one"),
]


@pytest.mark.parametrize("personas, says", BAD_PERSONAS)
def test_bad_personas_are_named(tmp_path, personas, says):
    path = write(tmp_path / "bad.jsonl", "", row(1, personas=PERSONAS), row(2, personas=personas))
    assert refusal(load_scenarios, path) == f"{path}:3: {says}"


def test_files_of_another_kind(tmp_path):
    hint = "pass a JSON Lines file, one JSON object per line"
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "blank").write_bytes(b"\n \n")
    (tmp_path / "binary").write_bytes(b'{"a": 1}\n\x93NUMPY\xff')
    (tmp_path / "array").write_bytes(b'[\n{"a": 1}\n]')
    (tmp_path / "folder").mkdir()
    for name, says in {
        "empty": "empty",
        "blank": "empty",
        "binary": r"cannot be read \(UnicodeDecodeError: .*\)",
        "array": r"1: cannot be read \(JSONDecodeError: .*\)",
        "folder": r"cannot be read \(Is a directory\)",
        "nothing": r"cannot be read \(No such file or directory\)",
    }.items():
        told = refusal(load_jsonl, tmp_path / name).removeprefix(f"{tmp_path / name}:")
        assert re.fullmatch(f" ?{says}; {hint}", told)


def test_other_ways_to_write_lines(tmp_path):
    """A byte order mark, CRLF, U+2028 inside a text, no last newline."""
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": "x\xe2\x80\xa8y"}')
    assert load_jsonl(tmp_path / "a") == [{"a": 1}, {"a": "x\u2028y"}]


def test_what_is_left_of_spread_is_even():
    assert dataset.spread(list(range(10)), 0) == list(range(10))
    few = dataset.spread(list(range(300)), 10)
    assert len(few) == 10 and few == sorted(few)
    assert max(b - a for a, b in zip(few, few[1:])) < 60
    assert set(few) <= set(dataset.spread(list(range(300)), 20))


# ---- likeness and check -----------------------------------------------------------------------


def test_jaccard_by_hand():
    """A: abcde bcdef; B: abcde bcdeg; one shared of three."""
    one, other = data_gen.grams("a b c d e f"), data_gen.grams("A, b; c d e - g!")
    assert data_gen.jaccard(one, other) == 1 / 3
    assert data_gen.grams("It\u2019s Three o'clock") == {("it\u2019s", "three", "o'clock")}


def test_memory_refuses_what_is_near():
    memory = Memory()
    memory.add({"id": "1", "dilemma": "a b c d e f"})
    near = {"id": "3", "dilemma": "a b c d e g"}  # one 5-gram of three
    says = "dilemma like one that is there (a b c d e f...); write it anew"
    assert memory.fault(near) == says
    assert memory.fault({"id": "3", "dilemma": "a b c d e g h"}) == ""  # one of four


def test_the_nearest_text_is_that_of_comparing_all_pairs():
    """Only texts that share a 5-gram are compared, and nothing is missed."""
    rows = load_jsonl(DATA / "dilemmas.jsonl")
    known, others = rows[:-20], rows[-20:]
    memory = Memory()
    for row in known:
        memory.add(row)
    texts = {row["dilemma"]: data_gen.grams(row["dilemma"]) for row in known}

    def brute(text):
        own = data_gen.grams(text)
        pairs = [(data_gen.jaccard(own, other), place) for place, other in texts.items()]
        likeness, nearest = max(pairs)
        return (likeness, nearest if likeness else "")

    found = set()
    for one, other in zip(known, others):
        words, tail = one["dilemma"].split(), other["dilemma"].split()
        for kept in range(0, len(words), 7):  # from another dilemma to this very one
            text = " ".join(words[:kept] + tail[kept:])
            assert memory.nearest(text) == brute(text), (one["id"], kept)
            found.add(brute(text)[0] >= data_gen.NEAR)
    assert found == {False, True}


def test_the_shipped_data_is_sound(capsys):
    assert data_gen.check() == 0
    assert capsys.readouterr().out == (
        "dilemmas.jsonl 320\npersonas.jsonl 25\neval_conflict.jsonl 100\neval_open.jsonl 100\n"
        "eval_general.jsonl 35\ndemonstrations.jsonl 640\njudge_labels.jsonl 2480\n"
        "agreement_labels.jsonl 890\nall sound\n"
    )


def test_the_general_set_can_be_answered():
    for item in load_jsonl(DATA / "eval_general.jsonl"):
        assert len(set(item["choices"])) == 4 and 0 <= item["answer"] < 4, item["id"]


@pytest.fixture
def wrong(tmp_path, capsys):
    """Change a copy of the data, {file: {line number: changes}}: what a check then says."""
    folder = tmp_path / "data"
    shutil.copytree(DATA, folder)

    def spoil(changes):
        for file, lines in changes.items():
            rows = load_jsonl(DATA / file)
            for number, change in lines.items():
                rows[number - 1] |= change
            write(folder / file, *rows)
        code = data_gen.check(folder)
        head, _, faults = capsys.readouterr().out.partition("wrong:\n")
        assert code == (1 if faults else 0)
        return faults.splitlines()

    spoil.folder = folder
    return spoil


SEALED = load_jsonl(DATA / "eval_conflict.jsonl")
PAIRS = load_jsonl(DATA / "personas.jsonl")
TRAIN = load_jsonl(DATA / "dilemmas.jsonl")
WRITTEN = load_jsonl(DATA / "demonstrations.jsonl")
THEY = [{"name": "Uma", "creed": "They " + "hold fast " * 12}, PAIRS[0]["personas"][0]]
TWINS = [{"name": n, "creed": PAIRS[0]["personas"][0]["creed"]} for n in ("Uma", "Una")]
LINE_FAULTS = [
    (
        "dilemmas.jsonl",
        {"dilemma": "word " * 90 + "why?"},
        "dilemma of 91 words; write 40 to 90",
    ),
    ("dilemmas.jsonl", {"dilemma": "Why?"}, "dilemma of 1 words; write 40 to 90"),
    (
        "eval_conflict.jsonl",
        {"dilemma": "word " * 50 + "."},
        "dilemma without a question at the end; end with the decision to be taken",
    ),
    (
        "eval_conflict.jsonl",
        {"personas": THEY},
        "creed not in the second person; address the persona as you",
    ),
    ("personas.jsonl", {"personas": TWINS}, "creeds alike; they must say different things"),
    ("eval_open.jsonl", {"question": "Why?"}, "question of 1 words; write 6 to 40"),
    ("eval_general.jsonl", {"answer": "Mars"}, '"answer" is text instead of a number; correct it'),
    (
        "demonstrations.jsonl",
        {"turns": ["We share it all.", "Agreed."]},
        "turn of 4 words; write 15 to 35",
    ),
    (
        "demonstrations.jsonl",
        {"turns": WRITTEN[0]["turns"][:1] * 2},
        "turns alike; they must say different things",
    ),
    (
        "demonstrations.jsonl",
        {"turns": ["word " * 20, 7]},
        '"turns" holds 7; write each turn as a text',
    ),
    ("demonstrations.jsonl", {"final": "Share it."}, "final of 2 words; write 30 to 60"),
    (
        "agreement_labels.jsonl",
        {"agreed": 1},
        '"agreed" is a number instead of true or false; correct it',
    ),
]


@pytest.mark.parametrize("file, change, says", LINE_FAULTS)
def test_check_sees_a_bad_line(file, change, says):
    row = load_jsonl(DATA / file)[0] | change
    assert data_gen.line_fault(row, data_gen.FILES[file]) == says


def test_check_names_the_lines_that_are_wrong(wrong):
    short = {"dilemma": "Why?"}
    assert wrong({"dilemmas.jsonl": {10: short, 12: short}}) == [
        "dilemmas.jsonl:10: dilemma of 1 words; write 40 to 90",
        "dilemmas.jsonl:12: dilemma of 1 words; write 40 to 90",
    ]
    (wrong.folder / "eval_open.jsonl").unlink()
    assert refusal(wrong, {}).startswith(f"{wrong.folder}/eval_open.jsonl: cannot be read (")


def test_check_sees_likeness_within_and_across_files(wrong):
    words = TRAIN[5]["dilemma"].split()
    near = " ".join([*words[:3], "altered", *words[4:]])
    creed, sealed = PAIRS[0]["personas"][1]["creed"], SEALED[9]["personas"]
    final = WRITTEN[2]["final"]
    faults = wrong(
        {
            "eval_conflict.jsonl": {
                8: {"dilemma": near},
                10: {"personas": [sealed[0], sealed[1] | {"creed": creed}]},
            },
            "demonstrations.jsonl": {2: {"final": final}},
        }
    )
    like = "like one that is there"
    assert faults == [
        f"eval_conflict.jsonl:8: dilemma {like} ({TRAIN[5]['dilemma'][:60]}...); write it anew",
        f"eval_conflict.jsonl:10: creed {like} ({creed[:60]}...); write it anew",
        f"demonstrations.jsonl:3: final {like} ({final[:60]}...); write it anew",
    ]


def test_check_sees_what_leaks_from_the_sealed_sets(wrong):
    labels = load_jsonl(DATA / "judge_labels.jsonl")
    same = [n for n, r in enumerate(labels, 1) if r["scenario_id"] == labels[2]["scenario_id"]]
    faults = wrong(
        {
            "demonstrations.jsonl": {4: {"personas": SEALED[0]["personas"]}},
            "judge_labels.jsonl": {
                2: {"scenario_id": SEALED[0]["id"]},
                same[-1]: {"split": "neither"},
            },
        }
    )
    assert faults == [
        "demonstrations.jsonl:4: personas that are no pair of personas.jsonl; "
        "take one of its pairs",
        f"judge_labels.jsonl:2: {SEALED[0]['id']} is no training dilemma; sealed ones must stay "
        "sealed",
        f"judge_labels.jsonl:{same[-1]}: {labels[2]['scenario_id']} is in both parts; keep a "
        "dilemma in one",
    ]


def test_check_sees_a_lack_of_variety(wrong):
    short = [n for n, r in enumerate(WRITTEN, 1) if len(r["final"].split()) <= 55]
    finals = {n: {"final": f"It is agreed that {WRITTEN[n - 1]['final']}"} for n in short}
    faults = wrong({"dilemmas.jsonl": {1: {"topic": "medicin"}}, "demonstrations.jsonl": finals})
    assert faults[:2] == [
        "dilemmas.jsonl and eval_conflict.jsonl: not the same topics; align them",
        "dilemmas.jsonl: topics with 1 to 11 lines; make them all alike",
    ]
    assert re.fullmatch(r"demonstrations.jsonl: \d+ different openings of 640 .*", faults[2])
    assert len(faults) == 3


# ---- the generator ------------------------------------------------------------------------------


def good(n, prompt):
    """A sound reply, unlike any other: for dilemmas or for personas, as the prompt asks."""

    def noise(what, count):
        return " ".join(f"{what}{n}x{i}" for i in range(count))

    if '"personas"' in prompt:
        return json.dumps(
            {
                "personas": [
                    {"name": f"{name}{n}, the judge", "creed": f"You hold {noise(name, 20)}."}
                    for name in ("Uno", "Duo")
                ]
            }
        )
    return json.dumps(
        {
            "dilemma": f"The  nurse and {n} porters {noise('thing', 40)}. What now?",
            "parties": ["the nurse", "porters"],
        }
    )


class LLM:
    """A chat server on loopback. `script(n, prompt)` answers request n: text, or (status, text)."""

    def __init__(self, script=good):
        self.script, self.prompts, self.payloads, self.keys = script, [], [], []
        llm, count, lock = self, itertools.count(), threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = payload["messages"][0]["content"]
                with lock:
                    n = next(count)
                    llm.prompts.append(prompt)
                    llm.payloads.append(payload)
                    llm.keys.append(self.headers.get("Authorization"))
                answer = llm.script(n, prompt)
                status, text = answer if isinstance(answer, tuple) else (200, answer)
                body = json.dumps(
                    {"choices": [{"message": {"role": "assistant", "content": text}}]}
                ).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:  # the client did not wait
                    pass

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve():
    """Start LLM servers that end with the test."""
    started = []
    yield lambda script=good: started.append(LLM(script)) or started[-1]
    for llm in started:
        llm.close()


@pytest.fixture
def run(monkeypatch, capsys):
    """Run data_gen.py with arguments: (exit code, the closing line)."""

    def go(*argv):
        monkeypatch.setattr(sys, "argv", ["data_gen.py", *map(str, argv)])
        code = data_gen.main()
        return code, capsys.readouterr().out.strip()

    return go


def args(out, llm, *more, command="dilemmas"):
    """A command line."""
    return (command, "--out", out, "--url", llm.url, "--model", "m", *more)


ONE = ("--concurrency", 1)  # requests in the order of the wishes


def test_dilemmas_are_diverse_by_construction(serve, run, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sesame")
    llm, out = serve(), tmp_path / "my.jsonl"
    assert run(*args(out, llm, "--n", 60)) == (None, f"{out}: 60 lines, 60 of them new")
    rows = load_jsonl(out, lambda r: data_gen.line_fault(r, data_gen.DILEMMA))
    assert len({r["id"] for r in rows}) == 60
    assert all(list(r) == ["id", "tier", "topic", "dilemma"] for r in rows)
    shipped = {(r["tier"], r["topic"]) for r in TRAIN}
    subjects = collections.Counter((r["tier"], r["topic"]) for r in rows)
    assert subjects == dict.fromkeys(shipped, 2)
    wish = re.compile(r"Kind: (.*)\. Topic: (.*)\. Setting: (.*)\.")
    wishes = [wish.search(prompt).groups() for prompt in llm.prompts]
    assert len(set(wishes)) == 60 and {w[:2] for w in wishes} == shipped
    assert set(llm.keys) == {"Bearer sesame"} and "sesame" not in out.read_text()
    assert {(p["model"], p["max_tokens"]) for p in llm.payloads} == {("m", 400)}
    assert len(load_scenarios(out)) == 60


def test_a_prompt_shows_three_lines_of_its_topic_and_no_sealed_one(serve, run, tmp_path):
    llm, out = serve(), tmp_path / "my.jsonl"
    run(*args(out, llm, "--n", 30))
    run(*args(out, llm, "--n", 60))
    assert all(prompt.count("\n- ") == 3 for prompt in llm.prompts)
    assert not any(r["dilemma"] in prompt for r in SEALED for prompt in llm.prompts)
    assert not any("x39." in prompt for prompt in llm.prompts[:30])
    assert all("x39." in prompt for prompt in llm.prompts[30:])  # lines of the first run


def test_the_same_command_goes_on(serve, run, tmp_path):
    llm, out = serve(), tmp_path / "my.jsonl"
    run(*args(out, llm, "--n", 20))
    before = out.read_bytes()
    assert run(*args(out, llm, "--n", 20)) == (None, f"{out}: 20 lines, 0 of them new")
    assert len(llm.prompts) == 20 and out.read_bytes() == before
    assert run(*args(out, llm, "--n", 23)) == (None, f"{out}: 23 lines, 3 of them new")
    assert len(llm.prompts) == 23 and out.read_bytes().startswith(before)


def say(text):
    return json.dumps({"dilemma": text})


def test_bad_replies_are_refused_counted_and_never_written(serve, run, tmp_path):
    long = "The nurse and the porter " + " ".join(f"w{i}" for i in range(60))
    bad = [
        "Sure! Here is one.",
        good(900, "") + good(901, ""),
        "[1]",
        "",
        json.dumps({"dilemma": 3}),
        json.dumps({"question": "x"}),
        say("The nurse and the porter quarrel. Who is right?"),
        say(long + " w" * 40 + "?"),
        say(long + "."),
        say(SEALED[0]["dilemma"]),
        good(0, ""),
        good(0, ""),
    ]
    out = tmp_path / "my.jsonl"
    llm = serve(lambda n, prompt: bad[n] if n < len(bad) else good(n, prompt))
    code, said = run(*args(out, llm, "--n", 13, *ONE))
    assert not code and len(llm.prompts) == 13 and len(load_jsonl(out)) == 2
    *faults, last = said.splitlines()
    like = "like one that is there"
    assert last == f"{out}: 2 lines, 2 of them new"
    assert sorted(re.sub("^gen-.* not written: ", "", fault) for fault in faults) == sorted(
        [
            *["not one JSON object; reply with it and nothing else"] * 4,
            '"dilemma" is a number instead of text; correct it',
            'no "dilemma"; needed are id, tier, topic, dilemma',
            "dilemma of 9 words; write 40 to 90",
            "dilemma of 105 words; write 40 to 90",
            "dilemma without a question at the end; end with the decision to be taken",
            f"dilemma {like} ({SEALED[0]['dilemma'][:60]}...); write it anew",
            f"dilemma {like} ({load_jsonl(out)[0]['dilemma'][:60]}...); write it anew",
        ]
    )
    assert run(*args(out, llm, "--n", 13)) == (None, f"{out}: 13 lines, 11 of them new")
    nothing = serve(lambda n, prompt: "no")
    says = refusal(run, *args(tmp_path / "new", nothing, "--n", 500))
    assert says.startswith(f"--url {nothing.url}: 20 replies in a row are of no use")


def test_replies_in_a_fence_or_after_thoughts_are_read(serve, run, tmp_path):
    wrap = [
        "```json\n{}\n```",
        "Here it is:\n{}",
        "<think>\nhm {1}\n</think>\n\n{}",
        "<think></think>```json\n{}\n```\n",
    ]
    llm = serve(lambda n, prompt: wrap[n].replace("{}", good(n, prompt)))
    code, said = run(*args(tmp_path / "o", llm, "--n", 4))
    assert said.endswith("o: 4 lines, 4 of them new")
    assert "The nurse and" in load_jsonl(tmp_path / "o")[0]["dilemma"]  # two blanks became one


def test_a_slow_and_failing_server(serve, run, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(data_gen, "TIMEOUT", 0.5)

    def script(n, prompt):
        if n == 0:
            time.sleep(1)  # one time-out
        return {1: (500, "oops"), 3: (404, "gone")}.get(n) or good(n, prompt)

    llm, out = serve(script), tmp_path / "my.jsonl"
    code, said = run(*args(out, llm, "--n", 3, *ONE))
    fault, last = said.splitlines()
    assert "not written: http 404 " in fault
    assert last == f"{out}: 2 lines, 2 of them new"
    half = serve(lambda n, prompt: (404, "gone") if n % 2 == 0 else good(n, prompt))
    code, said = run(*args(tmp_path / "c", half, "--n", 20, *ONE))  # never many in a row
    assert said.endswith(f"{tmp_path / 'c'}: 10 lines, 10 of them new")


def test_a_dead_server_and_a_refused_key_end_the_run(serve, run, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    llm, out = serve(lambda n, prompt: (401, "no such key")), tmp_path / "a"
    says = refusal(run, *args(out, llm, "--n", 500, "--concurrency", 2))
    assert says.startswith(f"--url {llm.url}: 20 replies in a row are of no use")
    assert "http 401 " in says and "no such key" in says
    assert says.endswith("; see to it and start again")
    assert 20 <= len(llm.prompts) <= 100
    llm.close()
    assert "the last: connection " in refusal(run, *args(out, llm, "--n", 500))


def test_personas(serve, run, tmp_path):
    bad = [json.loads(good(n, '"personas"'))["personas"] for n in range(4)]
    bad[0][0]["creed"] = SEALED[3]["personas"][0]["creed"]
    bad[1][1]["creed"] = bad[1][0]["creed"]
    bad[2][0]["creed"] = "You like tea."
    bad[3][0]["creed"] = bad[3][0]["creed"].replace("You hold", "They hold")
    out = tmp_path / "pairs.jsonl"
    llm = serve(lambda n, prompt: json.dumps({"personas": bad[n]}) if n < 4 else good(n, prompt))
    line = args(out, llm, "--n", 25, *ONE, command="personas")
    code, said = run(*line)
    for fault in (
        "creed like one that is there",
        "creeds alike",
        "creed of 3 words",
        "creed not in the second person",
    ):
        assert said.count(f"not written: {fault}") == 1
    assert run(*line) == (None, f"{out}: 25 lines, 4 of them new")
    rows = load_jsonl(out, lambda r: data_gen.line_fault(r, data_gen.PAIR))
    assert {r["axis"] for r in rows} == {r["axis"] for r in PAIRS}


def test_kill_minus_nine_in_mid_run_then_finish(serve, run, tmp_path):
    """The second run asks only for what is missing, and keeps the first one's lines as they are."""
    llm, out = serve(lambda n, prompt: time.sleep(0.1) or good(n, prompt)), tmp_path / "my.jsonl"
    line = [str(arg) for arg in args(out, llm, "--n", 40, "--concurrency", 2)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen([sys.executable, str(ROOT / "data_gen.py"), *line], **quiet)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if out.exists() and out.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    left = out.read_bytes()
    done, asked = left.count(b"\n"), len(llm.prompts)
    assert 5 <= done < 40 and left.endswith(b"\n")
    assert run(*line) == (None, f"{out}: 40 lines, {40 - done} of them new")
    assert len(llm.prompts) - asked == 40 - done and out.read_bytes().startswith(left)
    rows = load_jsonl(out, lambda r: data_gen.line_fault(r, data_gen.DILEMMA))
    wishes = data_gen.draw_wishes(TRAIN, 40)
    assert sorted(r["id"] for r in rows) == sorted(start["id"] for start, _ in wishes)


def test_a_full_disk_is_an_error_and_costs_no_line(serve, run, tmp_path):
    llm, out = serve(), tmp_path / "my.jsonl"
    run(*args(out, llm, "--n", 1))
    before = out.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))  # a part of a line
    try:
        says = refusal(run, *args(out, llm, "--n", 4, *ONE))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    hint = "mend that and start again, it goes on where it was"
    assert says == f"--out {out}: File too large; {hint}"
    assert out.read_bytes().startswith(before)
    assert refusal(run, *args(out, llm, "--n", 4)).startswith(f"{out}:2: cannot be read (")
    out.write_bytes(before)  # without the half line that it named
    assert run(*args(out, llm, "--n", 4)) == (None, f"{out}: 4 lines, 3 of them new")


OTHER_FILES = {
    b"remember the milk\n": ":1: cannot be read (",
    json.dumps(PAIRS[0]).encode() + b"\n": ':1: no "tier"; needed are id, tier, topic, dilemma',
    b"\x80\x81\n": ": cannot be read (",
    b"{": ":1: cannot be read (",
}


@pytest.mark.parametrize("data, says", OTHER_FILES.items())
def test_an_out_of_another_kind_is_refused_and_left_alone(serve, run, tmp_path, data, says):
    out, llm = tmp_path / "out", serve()
    out.write_bytes(data)
    assert refusal(run, *args(out, llm)).startswith(f"{out}{says}")
    assert out.read_bytes() == data and not llm.prompts


def test_a_shipped_file_that_is_not_there_is_named(serve, run, tmp_path, monkeypatch):
    llm, moved = serve(), tmp_path / "data"
    shutil.copytree(data_gen.DATA, moved)
    (moved / "settings.txt").unlink()
    monkeypatch.setattr(data_gen, "DATA", moved)
    says = f"{moved}/settings.txt: No such file or directory; "
    assert refusal(run, *args(tmp_path / "out", llm)).startswith(says)


def test_an_out_that_cannot_be_written(serve, run, tmp_path):
    llm = serve()
    for path, says in ((tmp_path, "Is a directory"), (tmp_path / "no" / "out", "No such file")):
        assert refusal(run, *args(path, llm)).startswith(f"{path}: {says}")
    assert not llm.prompts
    assert refusal(run, *args("/dev/full", llm)).startswith("--out /dev/full: No space left")


def test_the_command_line_says_what_to_do(run):
    commands = "say data_gen.py check, dilemmas or personas, and --help behind it"
    assert refusal(run) == refusal(run, "make") == commands
    for given in (), ("--out", "x"), ("--out", "x", "--url", "http://h/v1"):
        says = "data_gen.py dilemmas needs --out, --url and --model"
        assert refusal(run, "dilemmas", *given) == says
    assert refusal(run, "dilemmas", "--n", "0") == "--n 0: must be at least 1"
    bad_url = ("--out", "x", "--model", "m", "--url", "ftp://x")
    assert refusal(run, "dilemmas", *bad_url).startswith(
        "the server's address (--judge-url, --url) must look"
    )
