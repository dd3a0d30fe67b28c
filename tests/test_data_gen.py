"""data_gen.py: loading by seed, errors by line, the checks and what they catch, and the generator against a real HTTP server."""

import collections
import errno
import fcntl
import http.server
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import data_gen
from cli import UserError
from data_gen import DATA, Memory, load_jsonl, load_scenarios

ROOT = Path(data_gen.__file__).parent
PERSONAS = [{"name": "Ann", "creed": "You want this."}, {"name": "Bob", "creed": "You want that."}]


def write(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return str(path)


def row(n, **more):
    return {"id": f"d{n}", "tier": "everyday", "dilemma": f"Dilemma {n}?", **more}


# ---- loading --------------------------------------------------------------------------------------------------------


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
    code = "import data_gen; print(repr(data_gen.load_scenarios(seed=3)))"  # another process with another hash seed: another rank
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert other.stdout == repr(load_scenarios(seed=3)) + "\n"


def test_a_file_with_personas_is_used_as_it_is(tmp_path):
    path = write(
        tmp_path / "own.jsonl",
        row(1, personas=PERSONAS),
        "",
        row(2, personas=PERSONAS[::-1], source="mine"),
    )
    assert (
        load_scenarios(path, seed=1)
        == load_scenarios(path, seed=2)
        == [
            data_gen.Scenario("d1", "everyday", "Dilemma 1?", tuple(PERSONAS)),
            data_gen.Scenario("d2", "everyday", "Dilemma 2?", tuple(PERSONAS[::-1])),
        ]
    )


def test_dilemmas_of_ones_own_meet_shipped_or_given_pairs(tmp_path):
    path = write(tmp_path / "own.jsonl", *map(row, range(50)))
    assert (
        len({s.personas[0]["name"] for s in load_scenarios(path)}) == 50
    )  # 25 pairs, each once in either order
    pairs = write(tmp_path / "pairs.jsonl", {"personas": PERSONAS})
    assert (
        sorted(s.personas[0]["name"] for s in load_scenarios(path, personas=pairs))
        == ["Ann"] * 25 + ["Bob"] * 25
    )


@pytest.mark.parametrize(
    "bad, says",
    [
        (
            '{"id": "x", "tier"',
            "2: not JSON (Expecting ':' delimiter, column 19); write one JSON object per line",
        ),
        ("7", "2: a number instead of an object; write {...} with id, tier, dilemma"),
        ({"id": "x", "tier": "everyday"}, '2: no "dilemma"; needed are id, tier, dilemma'),
        (row(2, dilemma=None), '2: "dilemma" is null instead of text; correct it'),
        (row(2, id=5), '2: "id" is a number instead of text; correct it'),
        (row(2, dilemma=" \n"), '2: "dilemma" is empty; write it or take the line out'),
        (
            '{"id": "x", "tier": "t", "dilemma": "\\ud800"}',
            '2: "dilemma" holds half a character (a lone surrogate); correct it',
        ),
        (row(1), '2: id "d1" occurs twice; give every line an id of its own'),
        (
            row(2, personas=PERSONAS),
            "2: personas, but the lines above have none; give them to all lines or to none",
        ),
        ("[" * 99999, "2: not JSON ("),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, says):
    path = write(tmp_path / "bad.jsonl", row(1), bad)
    with pytest.raises(UserError) as error:
        load_scenarios(path)
    assert str(error.value).startswith(f"{path}:{says}") and (
        says.endswith("(") or str(error.value) == f"{path}:{says}"
    )


@pytest.mark.parametrize(
    "personas, says",
    [
        (
            PERSONAS[:1],
            '"personas" holds 1 instead of two; give two objects with a name and a creed',
        ),
        (
            PERSONAS + PERSONAS,
            '"personas" holds 4 instead of two; give two objects with a name and a creed',
        ),
        ({"a": 1}, '"personas" is an object instead of a list; correct it'),
        (
            [PERSONAS[0], "Bob"],
            "persona 2: text instead of an object; write {...} with name, creed",
        ),
        ([PERSONAS[0], {"name": "Bob"}], 'persona 2: no "creed"; needed are name, creed'),
        (
            [{"name": "", "creed": "You."}, PERSONAS[1]],
            'persona 1: "name" is empty; write it or take the line out',
        ),
        ([PERSONAS[0], PERSONAS[0]], "both personas have the same name; change one"),
    ],
)
def test_bad_personas_are_named(tmp_path, personas, says):
    path = write(tmp_path / "bad.jsonl", "", row(1, personas=PERSONAS), row(2, personas=personas))
    with pytest.raises(UserError) as error:
        load_scenarios(path)
    assert str(error.value) == f"{path}:3: {says}"


def test_files_of_another_kind(tmp_path):
    hint = "pass a JSON Lines file, one JSON object per line"
    cases = {
        "empty": b"",
        "blank": b"\n \n",
        "binary": b'{"a": 1}\n\x93NUMPY\xff',
        "array": b"[\n" + json.dumps(row(1)).encode() + b"\n]",
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    for name, says in {
        "empty": f": empty; {hint}",
        "blank": f": empty; {hint}",
        "binary": f":2: not UTF-8 text; {hint}",
        "array": ":1: not JSON (Expecting value, column 2); write one JSON object per line",
        "folder": f": cannot be read (Is a directory); {hint}",
        "nothing": f": cannot be read (No such file or directory); {hint}",
    }.items():
        with pytest.raises(UserError) as error:
            load_jsonl(tmp_path / name)
        assert str(error.value) == f"{tmp_path / name}{says}"


def test_other_ways_to_write_lines(tmp_path):
    (tmp_path / "a").write_bytes(
        b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": "x\xe2\x80\xa8y"}'
    )  # a BOM, CRLF, U+2028 inside a text, no last newline
    assert load_jsonl(tmp_path / "a") == [{"a": 1}, {"a": "x\u2028y"}]


# ---- likeness and check ---------------------------------------------------------------------------------------------


def test_jaccard_by_hand():
    # A: abcde bcdef; B: abcde bcdeg; 1 shared of 3
    assert (
        data_gen.jaccard(data_gen.grams("a b c d e f"), data_gen.grams("A, b; c d e - g!")) == 1 / 3
    )
    assert data_gen.grams("It\u2019s Three o'clock") == {("it\u2019s", "three", "o'clock")}
    memory = Memory()
    memory.add("one", {"id": "1", "dilemma": "a b c d e f"})
    memory.add("two", {"id": "2", "question": "v w x y z"})
    assert memory.nearest({"id": "3", "dilemma": "a b c d e g"}) == [(1 / 3, ("one", "1"))]
    assert (
        memory.fault({"id": "3", "dilemma": "a b c d e g"})
        == "near-duplicate (Jaccard 0.33 with 1 of one); write it anew"
    )
    assert memory.fault({"id": "3", "dilemma": "a b c d e g h"}) == ""  # 1 of 4


def test_nearest_equals_comparing_all_pairs():
    rows = load_jsonl(DATA / "dilemmas.jsonl") + load_jsonl(DATA / "eval_conflict.jsonl")
    memory = Memory()
    for r in rows:
        memory.add("all", r)
    for r in random.Random(0).sample(rows, 20):
        brute = [
            (data_gen.jaccard(data_gen.grams(a), data_gen.grams(b)), ("all", other["id"]))
            for a in data_gen.texts_of(r)
            for other in rows
            for b in data_gen.texts_of(other)
        ]
        assert memory.nearest(r) == sorted([pair for pair in brute if pair[0] > 0], reverse=True)


def checked(folder, capsys):
    """(exit code, what is wrong) of a check."""
    code = data_gen.check(data_gen.CheckSettings(str(folder)))
    out = capsys.readouterr().out
    return code, out.split("\nwrong:\n")[1].splitlines() if "\nwrong:\n" in out else [], out


def test_the_shipped_data_is_sound(capsys):
    code, wrong, out = checked(DATA, capsys)
    assert (code, wrong) == (0, []) and out.endswith("all sound\n")
    assert (
        "dilemmas.jsonl 320  personas.jsonl 25  eval_conflict.jsonl 100  eval_open.jsonl 100  eval_general.jsonl 120"
        in out
    )
    nearest = re.findall(r"^  (0\.\d{3})  (\S+) \S+  -  (\S+) \S+$", out, re.MULTILINE)
    assert len(nearest) == 10 and all(one != other for _, one, other in nearest)
    assert max(float(likeness) for likeness, _, _ in nearest) < 0.05


def test_the_general_set_can_be_answered():
    for item in load_jsonl(DATA / "eval_general.jsonl"):
        if item["kind"] == "choice":
            assert len(set(item["choices"])) == 4 and 0 <= item["answer"] < 4, item["id"]
        elif item["kind"] == "exact":
            assert item["answers"] and all(isinstance(a, str) and a for a in item["answers"]), item[
                "id"
            ]
        else:
            assert item["checks"] and all(isinstance(c["type"], str) for c in item["checks"]), item[
                "id"
            ]


def spoil(folder, file, n, change):
    """Apply `change` to line `n` of a set."""
    rows = load_jsonl(folder / file)
    rows[n] = change(rows[n])
    write(folder / file, *rows)
    return rows[n]["id"]


def test_check_sees_what_is_wrong(tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(DATA, folder)
    train = load_jsonl(DATA / "dilemmas.jsonl")
    near = train[5]["dilemma"].replace(train[5]["dilemma"].split()[3], "altered", 1)
    copied = spoil(folder, "eval_conflict.jsonl", 7, lambda r: {**r, "dilemma": near})
    long = spoil(folder, "dilemmas.jsonl", 9, lambda r: {**r, "dilemma": "word " * 90 + "why?"})
    flat = spoil(
        folder, "dilemmas.jsonl", 10, lambda r: {**r, "dilemma": r["dilemma"].rstrip("?") + "."}
    )
    pair = load_jsonl(DATA / "personas.jsonl")[0]["personas"]
    first = lambda r, **change: {
        **r,
        "personas": [{**r["personas"][0], **change}, r["personas"][1]],
    }
    shared = spoil(
        folder, "eval_conflict.jsonl", 8, lambda r: first(r, name=pair[0]["name"].upper())
    )
    creed = spoil(folder, "eval_conflict.jsonl", 9, lambda r: first(r, creed=pair[1]["creed"]))
    kind = spoil(folder, "eval_general.jsonl", 0, lambda r: {**r, "kind": "riddle"})
    spoil(
        folder,
        "personas.jsonl",
        2,
        lambda r: {**r, "id": load_jsonl(DATA / "personas.jsonl")[1]["id"]},
    )
    (folder / "eval_open.jsonl").unlink()
    (folder / "public_domain.txt").write_text("short")
    code, wrong, _ = checked(folder, capsys)
    name = pair[0]["name"].split(",")[0].lower()
    expected = [
        rf"dilemmas.jsonl: {long}: dilemma too long \(91 words\); write 40 to 90",
        rf"dilemmas.jsonl: {flat}: dilemma without a question at the end; end with the decision to be taken",
        r"dilemmas.jsonl: 318 sound lines instead of 320; write what is missing",
        r"personas.jsonl: pair-02: id occurs twice; change it",
        r"personas.jsonl: 24 sound lines instead of 25; write what is missing",
        rf"eval_conflict.jsonl: {copied}: near-duplicate \(Jaccard 0\.\d\d with {train[5]['id']} of dilemmas.jsonl\); write it anew",
        rf"eval_conflict.jsonl: {shared}: name already taken \({name}\); choose another",
        rf"eval_conflict.jsonl: {creed}: near-duplicate \(Jaccard 1.00 with pair-01 of personas.jsonl\); write it anew",
        r"eval_conflict.jsonl: 97 sound lines instead of 100; write what is missing",
        r".*eval_open.jsonl: cannot be read \(No such file or directory\); pass a JSON Lines file, one JSON object per line",
        r"eval_open.jsonl: 0 sound lines instead of 100; write what is missing",
        rf'eval_general.jsonl: {kind}: no kind "riddle"; use instruction, choice or exact',
        r"eval_general.jsonl: 119 sound lines instead of 120; write what is missing",
        r"eval_general.jsonl: 59 instructions of 119 lines; make it one half",
        r"public_domain.txt: missing, or shorter than 1000 words; put it back",
    ]
    assert code == 1 and len(wrong) == len(expected), wrong
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, wrong)), wrong


def test_check_sees_imbalance(tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(DATA, folder)
    rows = load_jsonl(folder / "dilemmas.jsonl")
    topic = rows[0]["topic"]
    write(
        folder / "dilemmas.jsonl",
        *[{**r, "topic": "medicin" if i == 0 else r["topic"]} for i, r in enumerate(rows)],
    )
    code, wrong, _ = checked(folder, capsys)
    assert (
        code == 1
        and wrong[0]
        == "dilemmas.jsonl and eval_conflict.jsonl: not the same tiers and topics; align them"
    )
    assert (
        re.fullmatch(
            r"dilemmas.jsonl: 31 topics with 1 to 11 lines; at least 24, all alike", wrong[1]
        )
        and len(wrong) == 2
    ), (topic, wrong)


def test_check_sees_bad_demonstrations_and_labels(tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(DATA, folder)
    rows = load_jsonl(DATA / "demonstrations.jsonl")
    sealed = load_jsonl(DATA / "eval_conflict.jsonl")[0]
    rows[0] = {**rows[0], "turns": [rows[0]["turns"][0], "Agreed."]}
    rows[1] = {**rows[1], "final": rows[2]["final"]}
    rows[3] = {**rows[3], "personas": sealed["personas"]}
    lost = rows[4]["scenario_id"]
    write(folder / "demonstrations.jsonl", *[r for r in rows if r["scenario_id"] != lost])
    labels = load_jsonl(DATA / "judge_labels.jsonl")
    labels[0] = {**labels[0], "score": 2.3}
    labels[1] = {**labels[1], "scenario_id": sealed["id"]}
    other = next(
        i for i, r in enumerate(labels) if r["scenario_id"] == labels[2]["scenario_id"] and i > 2
    )
    labels[other] = {**labels[other], "split": "neither"}
    write(folder / "judge_labels.jsonl", *labels)
    code, wrong, _ = checked(folder, capsys)
    assert code == 1 and wrong[0] == "demonstrations.jsonl:1: a turn has 1 words; write 15 to 35", (
        wrong
    )
    assert re.fullmatch(
        r"demonstrations.jsonl:3: a final is nearly another one \(.*\); write it anew", wrong[1]
    )
    assert (
        wrong[2]
        == "demonstrations.jsonl:4: personas that are no pair of personas.jsonl; take one of its pairs"
    )
    assert (
        wrong[3]
        == f"demonstrations.jsonl: none for 1 dilemmas, {lost} among them; write what is missing"
    )
    assert wrong[4:6] == [
        "judge_labels.jsonl:1: a rating that is no half point from 0 to 5; correct it",
        f"judge_labels.jsonl:2: {sealed['id']} is no training dilemma; sealed ones must not be judged here",
    ]
    assert (
        f"judge_labels.jsonl:{other + 1}: {labels[2]['scenario_id']} is in both parts; keep a dilemma in one"
        in wrong[6:]
    )


# ---- the generator --------------------------------------------------------------------------------------------------


def good(n, prompt):
    """A sound reply, unlike any other: for dilemmas or for personas, as the prompt asks."""
    noise = lambda what, count: " ".join(f"{what}{n}x{i}" for i in range(count))
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
    """A chat server on loopback. `script(n, prompt)` answers request n: a text, or (status, text), or a function that writes the reply."""

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


def test_dilemmas_are_diverse_by_construction(serve, run, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sesame")
    llm, out = serve(), tmp_path / "my.jsonl"
    args = ["dilemmas", "--out", out, "--url", llm.url, "--model", "big"]
    assert run(*args, "--n", 60) == (
        0,
        f"{out}: 60 lines, 60 of them new; 0 replies refused; 0 requests failed; 0 wishes skipped",
    )
    rows = load_jsonl(out, lambda r: data_gen.line_fault(r, data_gen.DILEMMA))
    assert len({r["id"] for r in rows}) == 60 and all(
        list(r) == ["id", "tier", "topic", "dilemma"] for r in rows
    )
    shipped = {(r["tier"], r["topic"]) for r in load_jsonl(DATA / "dilemmas.jsonl")}
    assert collections.Counter((r["tier"], r["topic"]) for r in rows) == {
        subject: 2 for subject in shipped
    }
    wishes = [
        re.search(r"Kind: (.*)\. Topic: (.*)\. Setting: (.*)\.", prompt).groups()
        for prompt in llm.prompts
    ]
    assert len(set(wishes)) == 60 and {w[:2] for w in wishes} == shipped
    assert set(llm.keys) == {"Bearer sesame"} and {
        (p["model"], p["temperature"]) for p in llm.payloads
    } == {("big", 1.0)}
    assert len(load_scenarios(out)) == 60 and "sesame" not in out.read_text()
    # a prompt shows three lines of its topic, shipped or accepted, and never a sealed one
    sealed = [r["dilemma"] for r in load_jsonl(DATA / "eval_conflict.jsonl")]
    assert all(prompt.count("\n- ") == 3 for prompt in llm.prompts) and not any(
        text in prompt for text in sealed for prompt in llm.prompts
    )
    # the same command again has nothing to do; a larger --n goes on
    before = out.read_bytes()
    assert run(*args, "--n", 60)[0] == 0 and len(llm.prompts) == 60 and out.read_bytes() == before
    assert (
        run(*args, "--n", 63)[0] == 0
        and len(llm.prompts) == 63
        and out.read_bytes().startswith(before)
    )
    assert any(
        rows[-1]["dilemma"] in prompt or "thing" in prompt for prompt in llm.prompts[60:]
    )  # accepted lines are shown
    with pytest.raises(
        UserError,
        match=r"^--n 1801: there are 1800 different wishes; ask for fewer, or add lines to data/settings.txt$",
    ):
        run(*args, "--n", 1801)


def test_bad_replies_are_refused_counted_and_never_written(serve, run, tmp_path):
    taken = load_jsonl(DATA / "eval_conflict.jsonl")[0]["dilemma"]
    say = lambda text, *parties: json.dumps({"dilemma": text, "parties": list(parties)})
    long = "The nurse and the porter " + " ".join(f"w{i}" for i in range(60))
    bad = [
        "Sure! Here is one.",
        good(900, "") + good(901, ""),
        "[1]",
        json.dumps({"dilemma": 3, "parties": []}),
        json.dumps({"dilemma": "x"}),
        say("The nurse and the porter quarrel. Who is right?", "the nurse", "the porter"),
        say(long + " w" * 40 + "?", "nurse", "porter"),
        say(long + ".", "nurse", "porter"),
        say(long + "?", "nurse", "the doctor"),
        say(long + "?", "nurse"),
        say(long + "?", "nurse", "Nurse"),
        say(taken, *re.findall(r"[a-z]{6,}", taken)[:2]),
        "",
    ]
    llm, out = (
        serve(lambda n, prompt: bad[n] if n < len(bad) else good(n, prompt)),
        tmp_path / "my.jsonl",
    )
    code, said = run(
        "dilemmas",
        "--n",
        2,
        "--out",
        out,
        "--url",
        llm.url,
        "--model",
        "m",
        "--concurrency",
        1,
        "--tries",
        len(bad) + 1,
    )
    assert len(llm.prompts) == len(bad) + 2 and len(load_jsonl(out)) == 2 and code == 0
    assert said == (
        f"{out}: 2 lines, 2 of them new; 13 replies refused, not one JSON object: 3, parties not found in the dilemma: 3, "
        'a list instead of an object: 1, "dilemma" is a number instead of text: 1, no "parties": 1, dilemma too short: 1, '
        "dilemma too long: 1, dilemma without a question at the end: 1, near-duplicate: 1; 0 requests failed; 0 wishes skipped"
    )
    assert llm.prompts[1].endswith(
        "Your last reply was refused: not one JSON object; reply with it and nothing else."
    )
    assert llm.prompts[6].endswith(
        "Your last reply was refused: dilemma too short (9 words); write 40 to 90."
    )
    assert re.search(
        r"refused: near-duplicate \(Jaccard 1.00 with conflict-001 of eval_conflict.jsonl\); write it anew\.$",
        llm.prompts[12],
    )


def test_a_reply_that_repeats_an_accepted_one_is_refused(serve, run, tmp_path):
    llm, out = serve(lambda n, prompt: good(n // 3, prompt)), tmp_path / "my.jsonl"
    code, said = run(
        "dilemmas", "--n", 3, "--out", out, "--url", llm.url, "--model", "m", "--concurrency", 1
    )
    assert (
        said
        == f"{out}: 3 lines, 3 of them new; 4 replies refused, near-duplicate: 4; 0 requests failed; 0 wishes skipped"
    )


def test_replies_in_a_fence_or_after_thoughts_are_read(serve, run, tmp_path):
    wrap = [
        "```json\n{}\n```",
        "```\n{}```",
        "<think>\nhm {{1}}\n</think>\n\n{}",
        "<think></think>```json\n{}\n```\n",
    ]
    llm = serve(lambda n, prompt: wrap[n].replace("{}", good(n, prompt)))
    assert run("dilemmas", "--n", 4, "--out", tmp_path / "o", "--url", llm.url, "--model", "m")[
        1
    ].endswith("o: 4 lines, 4 of them new; 0 replies refused; 0 requests failed; 0 wishes skipped")
    assert "The nurse and" in load_jsonl(tmp_path / "o")[0]["dilemma"]  # two blanks became one


def test_a_wish_whose_replies_are_all_bad_is_skipped_and_tried_again(serve, run, tmp_path):
    llm, out = serve(lambda n, prompt: "no" if n < 6 else good(n, prompt)), tmp_path / "my.jsonl"
    args = [
        "dilemmas",
        "--n",
        3,
        "--out",
        out,
        "--url",
        llm.url,
        "--model",
        "m",
        "--concurrency",
        1,
    ]
    assert run(*args) == (
        0,
        f"{out}: 1 lines, 1 of them new; 6 replies refused, not one JSON object: 6; 0 requests failed; "
        "2 wishes skipped (the same command tries them again)",
    )
    assert run(*args) == (
        0,
        f"{out}: 3 lines, 2 of them new; 0 replies refused; 0 requests failed; 0 wishes skipped",
    )
    assert (
        run(
            "dilemmas",
            "--n",
            1,
            "--out",
            tmp_path / "new",
            "--url",
            serve(lambda n, prompt: "no").url,
            "--model",
            "m",
        )[0]
        == 1
    )


def test_a_slow_and_failing_server(serve, run, tmp_path):
    def script(n, prompt):
        if n == 0:
            time.sleep(2)
        return {1: (500, "oops"), 3: (404, "gone")}.get(n) or good(n, prompt)

    llm, out = serve(script), tmp_path / "my.jsonl"
    code, said = run(
        "dilemmas",
        "--n",
        3,
        "--out",
        out,
        "--url",
        llm.url,
        "--model",
        "m",
        "--concurrency",
        1,
        "--timeout",
        0.5,
        "--attempts",
        1,
    )
    assert (code, said) == (
        0,
        f"{out}: 3 lines, 3 of them new; 0 replies refused; 3 requests failed, timeout: 1, http 500: 1, http 404: 1; "
        "0 wishes skipped",
    )
    assert len(llm.prompts) == 6
    half = serve(
        lambda n, prompt: (404, "gone") if n % 2 == 0 else good(n, prompt)
    )  # failures, but never many in a row
    assert run(
        "dilemmas",
        "--n",
        6,
        "--out",
        tmp_path / "c",
        "--url",
        half.url,
        "--model",
        "m",
        "--concurrency",
        1,
    )[1].endswith(
        "c: 6 lines, 6 of them new; 0 replies refused; 6 requests failed, http 404: 6; 0 wishes skipped"
    )
    flaky = serve(lambda n, prompt: (503, "busy") if n % 2 == 0 else good(n, prompt))
    assert run(
        "dilemmas",
        "--n",
        2,
        "--out",
        tmp_path / "b",
        "--url",
        flaky.url,
        "--model",
        "m",
        "--concurrency",
        1,
        "--attempts",
        2,
    )[1].endswith(
        "b: 2 lines, 2 of them new; 0 replies refused; 0 requests failed; 0 wishes skipped"
    )  # the client's own retry
    busy = serve(lambda n, prompt: (503, "busy"))
    limits = ["--tries", 1, "--attempts", 99, "--deadline", 1]
    assert (
        run(
            "dilemmas",
            "--n",
            1,
            "--out",
            tmp_path / "d",
            "--url",
            busy.url,
            "--model",
            "m",
            *limits,
        )[0]
        == 1
    )
    assert (
        1 <= len(busy.prompts) <= 4
    )  # pauses of 0.25 s and more, doubled each time, end at the deadline


def test_a_dead_server_and_a_refused_key_end_the_run(serve, run, tmp_path):
    llm = serve(lambda n, prompt: (401, "no such key"))
    with pytest.raises(
        UserError,
        match=rf"^--url {llm.url}: 5 requests in a row failed \(http 401 .*no such key.*\); see to it, and start again$",
    ):
        run(
            "dilemmas",
            "--n",
            500,
            "--out",
            tmp_path / "a",
            "--url",
            llm.url,
            "--model",
            "m",
            "--concurrency",
            2,
        )
    assert 5 <= len(llm.prompts) <= 6 and (tmp_path / "a").read_bytes() == b""
    llm.close()
    with pytest.raises(UserError, match=r"requests in a row failed \(connection "):
        run(
            "dilemmas",
            "--n",
            500,
            "--out",
            tmp_path / "a",
            "--url",
            llm.url,
            "--model",
            "m",
            "--attempts",
            1,
        )
    with pytest.raises(UserError, match=r"^--url: must look like http"):
        run("dilemmas", "--out", tmp_path / "a", "--url", "ftp://x", "--model", "m")


def test_personas(serve, run, tmp_path):
    taken = load_jsonl(DATA / "eval_conflict.jsonl")[3]["personas"][0]["name"]
    first = json.loads(good(0, '"personas"'))
    first["personas"][0]["name"] = taken
    same = json.loads(good(1, '"personas"'))
    same["personas"][1]["creed"] = same["personas"][0]["creed"]
    brief = json.loads(good(2, '"personas"'))
    brief["personas"][0]["creed"] = "You like tea."
    they = json.loads(good(3, '"personas"').replace("You hold", "They hold"))
    bad = list(map(json.dumps, (first, same, brief, they)))
    llm, out = (
        serve(lambda n, prompt: bad[n] if n < 4 else good(n, prompt)),
        tmp_path / "pairs.jsonl",
    )
    code, said = run(
        "personas",
        "--n",
        25,
        "--out",
        out,
        "--url",
        llm.url,
        "--model",
        "m",
        "--concurrency",
        1,
        "--tries",
        5,
    )
    assert (code, said) == (
        0,
        f"{out}: 25 lines, 25 of them new; 4 replies refused, name already taken: 1, creeds alike: 1, creed too short: 1, "
        "creed not in the second person: 1; 0 requests failed; 0 wishes skipped",
    )
    rows = load_jsonl(out, lambda r: data_gen.line_fault(r, data_gen.PAIR))
    assert {r["axis"] for r in rows} == {r["axis"] for r in load_jsonl(DATA / "personas.jsonl")}
    assert {s.personas[0]["name"][:3] for s in load_scenarios(personas=out)} == {"Uno", "Duo"}


def test_kill_minus_nine_in_mid_run_then_finish(serve, run, tmp_path):
    """The second run asks only for what is missing, and what the first wrote stays as it is, byte for byte."""
    llm, out = serve(lambda n, prompt: time.sleep(0.1) or good(n, prompt)), tmp_path / "my.jsonl"
    args = [
        "dilemmas",
        "--n",
        "40",
        "--out",
        str(out),
        "--url",
        llm.url,
        "--model",
        "m",
        "--concurrency",
        "2",
    ]
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "data_gen.py"), *args],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (out.exists() and out.read_bytes().count(b"\n") >= 5) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    left = out.read_bytes()
    done = left.count(b"\n")
    assert 5 <= done < 40 and left.endswith(b"\n")
    with out.open("ab") as file:  # and the worst moment of all: half a line, cut within a character
        file.write('{"id": "gen-medicine-001", "tier": "profess\u00e9'.encode()[:-1])
    asked = len(llm.prompts)
    assert run(*args) == (
        0,
        f"{out}: 40 lines, {40 - done} of them new; 0 replies refused; 0 requests failed; 0 wishes skipped",
    )
    assert len(llm.prompts) - asked == 40 - done and out.read_bytes().startswith(left)
    rows = load_jsonl(out, lambda r: data_gen.line_fault(r, data_gen.DILEMMA))
    wishes = data_gen.draw_wishes(load_jsonl(DATA / "dilemmas.jsonl"), 40, 0)
    assert sorted(r["id"] for r in rows) == sorted(start["id"] for start, _ in wishes)


def test_a_full_disk_is_an_error_and_leaves_whole_lines(serve, run, tmp_path, monkeypatch):
    llm, out = serve(), tmp_path / "my.jsonl"
    args = [
        "dilemmas",
        "--n",
        4,
        "--out",
        out,
        "--url",
        llm.url,
        "--model",
        "m",
        "--concurrency",
        1,
    ]
    real, calls = os.write, itertools.count(1)

    def full(fd, data):
        n = next(calls)
        if n == 2:
            return real(fd, data[:100])  # the last free block takes a part of the line
        if n > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    for lines in (1, 1):
        with monkeypatch.context() as patch, pytest.raises(UserError) as error:
            patch.setattr(data_gen.os, "write", full)
            run(*args)
        assert (
            str(error.value)
            == f"--out {out}: cannot be written (No space left on device); make room and start again, it goes on where it was"
        )
        assert out.read_bytes().count(b"\n") == lines and out.read_bytes().endswith(b"\n")
    assert (
        run(*args)[1]
        == f"{out}: 4 lines, 3 of them new; 0 replies refused; 0 requests failed; 0 wishes skipped"
    )


def test_an_out_of_another_kind_is_refused_and_left_alone(run, tmp_path):
    url = "http://127.0.0.1:9/v1"
    pair = load_jsonl(DATA / "personas.jsonl")[0]
    conflict = load_jsonl(DATA / "eval_conflict.jsonl")[0]
    for name, data, says in (
        (
            "notes",
            b"remember the milk\n",
            ":1: not JSON (Expecting value, column 1); write one JSON object per line",
        ),
        (
            "note",
            b"remember the milk",
            ": the last line is not ours and has no end; finish it, or name another file",
        ),
        (
            "pairs",
            json.dumps(pair).encode() + b"\n",
            ':1: no "tier"; needed are id, tier, topic, dilemma',
        ),
        (
            "conflict",
            json.dumps(conflict).encode() + b"\n",
            ":1: holds other keys too; name another --out",
        ),
        (
            "binary",
            b"\x80\x81\n",
            ":1: not UTF-8 text; pass a JSON Lines file, one JSON object per line",
        ),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError) as error:
            run("dilemmas", "--out", tmp_path / name, "--url", url, "--model", "m")
        assert (
            str(error.value).removeprefix("--out ") == f"{tmp_path / name}{says}"
            and (tmp_path / name).read_bytes() == data
        )
    for path, says in (
        (tmp_path, "cannot be written (Is a directory)"),
        (tmp_path / "no" / "o", "cannot be written (No such file or directory)"),
        ("/dev/full", "not a plain file"),
    ):
        with pytest.raises(UserError) as error:
            run("dilemmas", "--out", path, "--url", url, "--model", "m")
        assert str(error.value).startswith(f"--out {path}: {says}; name another")
    with open(tmp_path / "busy", "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(
            UserError, match="another run is writing to it; wait for it, or name another file$"
        ):
            run("dilemmas", "--out", tmp_path / "busy", "--url", url, "--model", "m")


def test_the_command_line_says_what_to_do(run):
    for argv, says in (
        (["dilemmas"], "--out: names no file; say --out my.jsonl"),
        (
            [],
            "no command: say python data_gen.py check, dilemmas or personas, and --help behind it",
        ),
        (
            ["dilemmas", "--out", "x", "--url", "http://h/v1"],
            "--model: names no model; say which one the server is to use",
        ),
        (["dilemmas", "--out", "x"], "--url: names no server; say --url http://127.0.0.1:8000/v1"),
        (["dilemmas", "--n", "0"], "--n 0: must be at least 1"),
    ):
        with pytest.raises(UserError) as error:
            run(*argv)
        assert str(error.value) == says
