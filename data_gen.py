"""Scenarios: load the shipped dilemmas and personas, check them, and make more with any LLM.

    data/dilemmas.jsonl + data/personas.jsonl, combined by seed  ->  list of Scenario      load_scenarios()
    FILE whose lines carry two personas each, used as it is      ->  list of Scenario      load_scenarios(FILE)
    data/demonstrations.jsonl, negotiations that were written out   ->  list of Demonstration   load_demonstrations()
    (tier, topic, setting) drawn by seed -> LLM -> one JSON object -> checked -> one line  Generator

The same checks refuse a bad line of ours, of yours and of the LLM. Left out on purpose: a judge of quality. The checks see
form, length and word-for-word likeness; whether a dilemma is worth an hour of somebody's thought, only a reader sees.

    python data_gen.py check                                    # verify data/, print the counts and the nearest pairs
    python data_gen.py dilemmas --n 500 --out my.jsonl --url http://127.0.0.1:8000/v1 --model NAME    # key: JUDGE_API_KEY
    python data_gen.py personas --n 25 --out pairs.jsonl --url ... --model ...
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import random
import re
import stat
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from cli import UserError, command_line, option, run_cli
from client import Client, Missing, dig
from reward import fill

DATA = Path(__file__).resolve().parent / "data"
DILEMMA, PAIR = (
    {"id": str, "tier": str, "topic": str, "dilemma": str},
    {"id": str, "axis": str, "personas": list},
)
SETS = {  # shipped file -> (how many lines, what a line holds)
    "dilemmas.jsonl": (320, DILEMMA),
    "personas.jsonl": (25, PAIR),
    "eval_conflict.jsonl": (100, {**DILEMMA, "personas": list}),
    "eval_open.jsonl": (100, {"id": str, "topic": str, "question": str}),
    "eval_general.jsonl": (120, {"id": str, "kind": str, "prompt": str}),
}
DEMONSTRATION = {"scenario_id": str, "personas": list, "turns": list, "agreed": bool, "final": str}
WORDS = {
    "dilemma": (40, 90),
    "creed": (20, 50),
    "question": (6, 40),
    "prompt": (3, 100),
}  # at least, at most
NEAR = 0.3  # word 5-gram Jaccard from which two texts count as the same


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What is negotiated: a dilemma, and two personas {name, creed} in speaking order."""

    id: str
    tier: str
    dilemma: str
    personas: tuple


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A negotiation that somebody wrote, to be imitated: what was said in turn (scenario.personas[0] opens), and the joint solution."""

    scenario: Scenario
    turns: tuple  # of texts
    agreed: bool
    final: str


# ---- likeness -------------------------------------------------------------------------------------------------------


def grams(text):
    """The word 5-grams of a text, case and punctuation aside; a shorter text is one gram."""
    words = re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", text.lower())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def jaccard(a, b):
    """|A & B| / |A | B| of two sets."""
    return len(a & b) / len(a | b)


def texts_of(row):
    """The texts of a line that must not resemble another's."""
    return [row[key] for key in WORDS if type(row.get(key)) is str] + [
        p["creed"] for p in row.get("personas", ())
    ]


def names_of(row):
    """The names of a line's personas, without "the ..." behind a comma."""
    return {p["name"].split(",")[0].strip().lower() for p in row.get("personas", ())}


class Memory:
    """The lines that are there: nothing new may resemble them. Texts are kept by 5-gram, so only those that share one are compared."""

    def __init__(self):
        self.texts, self.holders, self.names = (
            [],
            collections.defaultdict(set),
            set(),
        )  # [(place, grams)]; gram -> indices of texts

    def add(self, file, row):
        """From now on nothing may resemble `row`, which stands in `file`."""
        self.names |= names_of(row)
        for own in map(grams, texts_of(row)):
            for gram in own:
                self.holders[gram].add(len(self.texts))
            self.texts.append(((file, row["id"]), own))

    def nearest(self, row):
        """[(Jaccard, (file, id))] of all texts that share a 5-gram with one of `row`'s, nearest first."""
        near = []
        for own in map(grams, texts_of(row)):
            for i in set().union(*(self.holders.get(gram, ()) for gram in own)):
                place, theirs = self.texts[i]
                near.append((jaccard(own, theirs), place))
        return sorted(near, reverse=True)

    def fault(self, row):
        """Is `row` new, its texts and the names of its personas?"""
        for likeness, (file, other) in self.nearest(row)[:1]:
            if likeness >= NEAR:
                return (
                    f"near-duplicate (Jaccard {likeness:.2f} with {other} of {file}); write it anew"
                )
        taken = ", ".join(sorted(names_of(row) & self.names))
        return f"name already taken ({taken}); choose another" if taken else ""


# ---- what is wrong with a line: each function returns "what is wrong; what to do", or "" ----------------------------

TYPES = {
    str: "text",
    list: "a list",
    dict: "an object",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def shape_fault(row, shape):
    """Is it an object that holds `shape` = {key: type}, with something in every text, and two personas under "personas"?"""
    if type(row) is not dict:
        return f"{TYPES[type(row)]} instead of an object; write {{...}} with {', '.join(shape)}"
    for key, kind in shape.items():
        if key not in row:
            return f'no "{key}"; needed are {", ".join(shape)}'
        if type(row[key]) is not kind and not (kind is float and type(row[key]) is int):
            return f'"{key}" is {TYPES[type(row[key])]} instead of {TYPES[kind]}; correct it'
        if kind is str and not row[key].strip():
            return f'"{key}" is empty; write it or take the line out'
        if kind is str and any("\ud800" <= c <= "\udfff" for c in row[key]):
            return f'"{key}" holds half a character (a lone surrogate); correct it'
    if "personas" not in shape:
        return ""
    if len(row["personas"]) != 2:
        return f'"personas" holds {len(row["personas"])} instead of two; give two objects with a name and a creed'
    for i, persona in enumerate(row["personas"], 1):
        fault = shape_fault(persona, {"name": str, "creed": str})
        if fault:
            return f"persona {i}: {fault}"
    return (
        "both personas have the same name; change one"
        if row["personas"][0]["name"] == row["personas"][1]["name"]
        else ""
    )


def line_fault(row, shape):
    """Is it a line as good as the shipped ones are: shape, lengths, a question at the end, creeds in the second person?"""
    fault = shape_fault(row, shape)
    if fault:
        return fault
    creeds = [p["creed"] for p in row["personas"]] if "personas" in shape else []
    for key, text in [(key, row[key]) for key in WORDS if key in shape] + [
        ("creed", creed) for creed in creeds
    ]:
        (low, high), n = WORDS[key], len(text.split())
        if not low <= n <= high:
            return f"{key} too {'short' if n < low else 'long'} ({n} words); write {low} to {high}"
    if "dilemma" in shape and not row["dilemma"].rstrip().endswith("?"):
        return "dilemma without a question at the end; end with the decision to be taken"
    if not all(re.search(r"\byou(r|rs|rself)?\b", creed, re.IGNORECASE) for creed in creeds):
        return "creed not in the second person; address the persona as you"
    if creeds and jaccard(*map(grams, creeds)) >= NEAR:
        return "creeds alike; the two must want different things"
    if "prompt" in shape:
        return answer_fault(row)
    return ""


def answer_fault(row):
    """Does a line of the general set hold what its answer is checked by?"""
    by = {
        "choice": {"choices": list, "answer": int},
        "exact": {"answers": list},
    }.get(row["kind"])
    if by is None:
        return f'no kind "{row["kind"]}"; use choice or exact'
    return shape_fault(row, by)


# ---- JSON Lines, with errors that name the line ---------------------------------------------------------------------


def load_jsonl(path, fault_of=lambda row: ""):
    """The values of a JSON Lines file in order, blank lines passed over; `fault_of(row)` says what is wrong with one ("": nothing).

    Raises UserError: "FILE:LINE: what is wrong; what to do", also for a file that is empty, missing or of another kind.
    """
    try:
        data = Path(path).read_bytes()
        lines = data.decode("utf-8-sig").split(
            "\n"
        )  # not splitlines: U+2028 may stand inside a JSON text
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); pass a JSON Lines file, one JSON object per line"
        )
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 text; pass a JSON Lines file, one JSON object per line"
        )
    rows = []
    for n, line in [(n, line) for n, line in enumerate(lines, 1) if line.strip()]:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            reason = (
                f"{error.msg}, column {error.colno}"
                if isinstance(error, json.JSONDecodeError)
                else str(error)
            )
            raise UserError(f"{path}:{n}: not JSON ({reason}); write one JSON object per line")
        fault = fault_of(rows[-1])
        if fault:
            raise UserError(f"{path}:{n}: {fault}")
    if not rows:
        raise UserError(f"{path}: empty; pass a JSON Lines file, one JSON object per line")
    return rows


# ---- scenarios ------------------------------------------------------------------------------------------------------


def shuffled(items, rng):
    """A random order that is the same on every Python: only `random()` itself is guaranteed to stay."""
    return sorted(items, key=lambda _: rng.random())


def spread(items, n):
    """`n` of the items, about evenly spaced, so that every tier and topic of an ordered file has its share; all of them for 0.

    Multiples of the golden ratio, modulo 1, fill the unit interval evenly: so the items whose multiple is small lie evenly too,
    and a larger `n` only adds some.
    """
    chosen = sorted(range(len(items)), key=lambda i: i * 0.6180339887498949 % 1)[: n or None]
    return [items[i] for i in sorted(chosen)]


def load_scenarios(path=None, seed=0, personas=None):
    """The scenarios of a JSON Lines file (None: the shipped dilemmas), in the file's order, the same on every rank.

    Lines {id, tier, dilemma, personas} are used as they are. Lines without personas get a pair of `personas` (a file of
    lines {personas}; None: the shipped pairs) by seed. Raises UserError as `load_jsonl` does.
    """
    shape, ids = {"id": str, "tier": str, "dilemma": str}, set()

    def fault_of(row):
        """What is wrong with a line, or None."""
        if not ids and type(row) is dict and "personas" in row:
            shape["personas"] = list  # the first line decides for all
        fault = shape_fault(row, shape)
        if fault:
            return fault
        if row["id"] in ids:
            return f'id "{row["id"]}" occurs twice; give every line an id of its own'
        if "personas" in row and "personas" not in shape:
            return "personas, but the lines above have none; give them to all lines or to none"
        ids.add(row["id"])
        return ""

    rows = load_jsonl(path or DATA / "dilemmas.jsonl", fault_of)
    if "personas" in shape:
        pairs = [row["personas"] for row in rows]
    else:
        pairs = load_jsonl(
            personas or DATA / "personas.jsonl", lambda row: shape_fault(row, {"personas": list})
        )
        pairs = deal_pairs([row["personas"] for row in pairs], len(rows), seed)
    keep = lambda pair: tuple({"name": p["name"], "creed": p["creed"]} for p in pair)
    return [
        Scenario(row["id"], row["tier"], row["dilemma"], keep(pair))
        for row, pair in zip(rows, pairs)
    ]


def deal_pairs(pairs, n, seed):
    """`n` pairs in seeded rounds, each round a new order of all pairs; who speaks first changes from round to round."""
    rng = random.Random(seed)
    swapped, dealt = [rng.random() < 0.5 for _ in pairs], []
    for turn in range(-(-n // len(pairs))):
        dealt += [
            pairs[k][::-1] if swapped[k] ^ turn % 2 else pairs[k]
            for k in shuffled(range(len(pairs)), rng)
        ]
    return dealt[:n]


def load_demonstrations(path=None, scenarios=None):
    """The negotiations of a JSON Lines file (None: the shipped ones) whose lines are like DEMONSTRATION, in the file's order.

    The dilemma of a line is that of its scenario_id in the file `scenarios` (None: the shipped dilemmas). Raises UserError as `load_jsonl` does.
    """
    known = {s.id: s for s in load_scenarios(scenarios)}

    def fault_of(row):
        if fault := shape_fault(row, DEMONSTRATION):
            return fault
        if row["scenario_id"] not in known:
            return f'scenario_id "{row["scenario_id"]}" is not in {scenarios or "data/dilemmas.jsonl"}; correct it, or name its file with --scenarios'
        if len(row["turns"]) < 2:
            return f'"turns" holds {len(row["turns"])}; a negotiation has at least two'
        odd = [
            turn
            for turn in row["turns"]
            if type(turn) is not str
            or not turn.strip()
            or any("\ud800" <= c <= "\udfff" for c in turn)
        ]
        return f'"turns" holds {json.dumps(odd[0])[:40]}; write each turn as a text' if odd else ""

    def demonstration(row):
        scenario = dataclasses.replace(known[row["scenario_id"]], personas=tuple(row["personas"]))
        return Demonstration(
            scenario,
            tuple(turn.strip() for turn in row["turns"]),
            row["agreed"],
            row["final"].strip(),
        )

    return [
        demonstration(row) for row in load_jsonl(path or DATA / "demonstrations.jsonl", fault_of)
    ]


# ---- check the shipped data -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CheckSettings:
    """What to check."""

    data: str = option(str(DATA), "the folder with the sets")


def check(settings):
    """Verify the sets in a folder, print counts and nearest pairs; 0 when all is well, else 1 and what is wrong."""
    folder, memory, faults, across, sets = Path(settings.data), Memory(), [], [], {}
    for file, (lines, shape) in SETS.items():
        try:
            rows = load_jsonl(folder / file, lambda row: shape_fault(row, {"id": str}))
        except UserError as error:
            faults.append(str(error))
            rows = []
        sets[file] = {}  # id -> line
        for row in rows:
            fault = (
                line_fault(row, shape)
                or memory.fault(row)
                or ("id occurs twice; change it" if row["id"] in sets[file] else "")
            )
            if fault:
                faults.append(f"{file}: {row['id']}: {fault}")
            else:
                across += [
                    (likeness, (file, row["id"]), place)
                    for likeness, place in memory.nearest(row)
                    if place[0] != file
                ]
                memory.add(file, row)
                sets[file][row["id"]] = row
        if len(sets[file]) != lines:
            faults.append(
                f"{file}: {len(sets[file])} sound lines instead of {lines}; write what is missing"
            )
    faults += balance_faults(sets) + demonstration_faults(folder) + label_faults(folder)
    text = folder / "public_domain.txt"
    if not text.is_file() or len(text.read_text(encoding="utf-8", errors="replace").split()) < 1000:
        faults.append("public_domain.txt: missing, or shorter than 1000 words; put it back")
    print(
        "  ".join(f"{file} {len(rows)}" for file, rows in sets.items()) + "\n\nin training, sealed"
    )
    for (tier, topic), n in sorted(counted(sets["dilemmas.jsonl"]).items()):
        print(f"{n:4}{counted(sets['eval_conflict.jsonl'])[tier, topic]:4}  {tier} {topic}")
    print("\nthe ten nearest pairs across sets (word 5-gram Jaccard)")
    for likeness, one, other in sorted(across, reverse=True)[:10]:
        print(f"  {likeness:.3f}  {' '.join(one)}  -  {' '.join(other)}")
    print("\n" + "\n".join(["wrong:"] + faults if faults else ["all sound"]))
    return 1 if faults else 0


def counted(rows):
    """{(tier, topic): lines}, and {(tier, ""): lines} for a tier in all."""
    return collections.Counter(
        key for row in rows.values() for key in ((row["tier"], ""), (row["tier"], row["topic"]))
    )


def balance_faults(sets):
    """Three tiers and at least 24 topics, the same in training and evaluation, equal to two lines."""
    faults = []
    counts = {file: counted(sets[file]) for file in ("dilemmas.jsonl", "eval_conflict.jsonl")}
    if len({frozenset(c) for c in counts.values()}) > 1:
        faults.append(f"{' and '.join(counts)}: not the same tiers and topics; align them")
    for file, c in counts.items():
        for what, least, of in (
            ("tiers", 3, [n for key, n in c.items() if not key[1]]),
            ("topics", 24, [n for key, n in c.items() if key[1]]),
        ):
            if len(of) < least or max(of) - min(of) > 2:
                faults.append(
                    f"{file}: {len(of)} {what} with {min(of, default=0)} to {max(of, default=0)} lines; at least {least}, all alike"
                )
    return faults


SAID = {
    "turn": (15, 35),
    "final": (30, 60),
}  # words of a shipped demonstration's texts, at least and at most


def demonstration_faults(folder):
    """What is wrong with demonstrations.jsonl: lengths, likeness, openings that repeat, a scenario or persona that is not one of training."""
    try:
        demonstrations = load_demonstrations(
            folder / "demonstrations.jsonl", folder / "dilemmas.jsonl"
        )
        pairs = [
            row["personas"]
            for row in load_jsonl(
                folder / "personas.jsonl", lambda row: shape_fault(row, {"personas": list})
            )
        ]
        dilemmas = {row["id"] for row in load_jsonl(folder / "dilemmas.jsonl")}
    except UserError as error:
        return [str(error)]
    faults, holders, known = (
        [],
        collections.defaultdict(list),
        [{p["name"]: p["creed"] for p in pair} for pair in pairs],
    )
    for n, d in enumerate(demonstrations, 1):
        if {p["name"]: p["creed"] for p in d.scenario.personas} not in known:
            faults.append(
                f"demonstrations.jsonl:{n}: personas that are no pair of personas.jsonl; take one of its pairs"
            )
        if not 2 <= len(d.turns) <= 4:
            faults.append(f"demonstrations.jsonl:{n}: {len(d.turns)} turns; write 2 to 4")
        for kind, text in [*(("turn", turn) for turn in d.turns), ("final", d.final)]:
            (low, high), count, own = SAID[kind], len(text.split()), grams(text)
            if not low <= count <= high:
                faults.append(
                    f"demonstrations.jsonl:{n}: a {kind} has {count} words; write {low} to {high}"
                )
            if any(jaccard(own, other) >= NEAR for gram in own for other in holders[gram]):
                faults.append(
                    f"demonstrations.jsonl:{n}: a {kind} is nearly another one ({text[:40]}...); write it anew"
                )
            for gram in own:
                holders[gram].append(own)
    missing = dilemmas - {d.scenario.id for d in demonstrations}
    if missing:
        faults.append(
            f"demonstrations.jsonl: none for {len(missing)} dilemmas, {min(missing)} among them; write what is missing"
        )
    openings = collections.Counter(" ".join(d.final.lower().split()[:3]) for d in demonstrations)
    if len(openings) < 0.8 * len(demonstrations):
        common = openings.most_common(1)[0][0]
        faults.append(
            f'demonstrations.jsonl: {len(openings)} different openings of {len(demonstrations)} finals ("{common}"); vary them'
        )
    print(
        f"demonstrations.jsonl {len(demonstrations)}, {sum(d.agreed for d in demonstrations)} of them agreed, {len(openings)} openings of finals"
    )
    return faults


LABEL = {
    "id": str,
    "scenario_id": str,
    "split": str,
    "source": str,
    "personas": list,
    "solution": str,
    "score": float,
    "endorse": list,
}
ENDING = {
    "id": str,
    "scenario_id": str,
    "split": str,
    "personas": list,
    "turns": list,
    "agreed": bool,
}


def label_faults(folder):
    """What is wrong with the judge's labels: form, ratings in halves from 0 to 5, a dilemma in both parts or none of training."""
    faults, part = [], {}
    for file, shape in (("judge_labels.jsonl", LABEL), ("agreement_labels.jsonl", ENDING)):
        try:
            rows = load_jsonl(folder / file, lambda row, shape=shape: shape_fault(row, shape))
            dilemmas = {row["id"] for row in load_jsonl(folder / "dilemmas.jsonl")}
        except UserError as error:
            return [*faults, str(error)]
        for n, row in enumerate(rows, 1):
            ratings = [row["score"], *row["endorse"]] if shape is LABEL else []
            if any(2 * x not in range(11) for x in ratings):
                faults.append(f"{file}:{n}: a rating that is no half point from 0 to 5; correct it")
            if row["scenario_id"] not in dilemmas:
                faults.append(
                    f"{file}:{n}: {row['scenario_id']} is no training dilemma; sealed ones must not be judged here"
                )
            if part.setdefault(row["scenario_id"], row["split"]) != row["split"]:
                faults.append(
                    f"{file}:{n}: {row['scenario_id']} is in both parts; keep a dilemma in one"
                )
        counts = collections.Counter(row["split"] for row in rows)
        print(
            f"{file} {len(rows)} on {len({row['scenario_id'] for row in rows})} dilemmas, {counts['test']} of them in the test part"
        )
    return faults


# ---- make more with an LLM ------------------------------------------------------------------------------------------

ASK_DILEMMA = """Write one moral dilemma for a negotiation exercise. Kind: {tier}. Topic: {topic}. Setting: {setting}.
It has 40 to 90 words: a concrete situation, at least two parties who each have a legitimate claim, no obvious answer, no real person's name.
The last sentence is a question: the decision that has to be taken now. Do not resemble these:
{avoid}
Reply with one JSON object and nothing else, the two parties named by words copied from the dilemma:
{"dilemma": "...", "parties": ["...", "..."]}"""
ASK_PAIR = """Write two opposing personas for a negotiation exercise. What divides them: {axis}. Where they come from: {setting}.
Each has a name (a first name, perhaps with a trade) and a creed: 20 to 50 words in the second person ("You believe ..."), about what they
hold dear in any dispute. The two creeds really conflict, and either could be right. Do not resemble these:
{avoid}
Reply with one JSON object and nothing else:
{"personas": [{"name": "...", "creed": "..."}, {"name": "...", "creed": "..."}]}"""


@dataclasses.dataclass(frozen=True)
class GenerateSettings:
    """How many lines to make, where, and by whom."""

    n: int = option(
        100,
        "wishes to draw; each gives one line, or none when all replies to it are refused",
        low=1,
    )
    out: str = option("", "JSON Lines file to write; what is there already is kept and continued")
    url: str = option("", "OpenAI-compatible server, http://host:port/v1")
    model: str = option("", "name of the model on that server")
    seed: int = option(0, "of the drawing of wishes", low=0)
    tries: int = option(3, "replies to ask for, for one wish, before it is skipped", low=1)
    temperature: float = option(1.0, "of the LLM", low=0)
    tokens: int = option(400, "tokens that a reply may have", low=64)
    concurrency: int = option(4, "requests in flight at most", low=1)
    timeout: float = option(120.0, "seconds that one attempt of a request may take", above=0)
    attempts: int = option(3, "attempts of a request whose server fails", low=1)
    deadline: float = option(300.0, "seconds for a request with all its attempts", above=0)


def draw_wishes(shipped, n, seed):
    """The first `n` of all (start of a line, setting) in a seeded order that takes the subjects of `shipped` in turn, without repetition.

    The id in the start of a line follows from subject and setting, so a file tells which wishes it answers.
    """
    settings = (DATA / "settings.txt").read_text(encoding="utf-8").splitlines()
    subjects = list(
        dict.fromkeys(
            tuple((key, row[key]) for key in ("tier", "topic", "axis") if key in row)
            for row in shipped
        )
    )
    if n > len(subjects) * len(settings):
        raise UserError(
            f"--n {n}: there are {len(subjects) * len(settings)} different wishes; ask for fewer, or add lines to data/settings.txt"
        )
    subjects = shuffled(subjects, random.Random(seed))
    orders = {
        subject: shuffled(range(len(settings)), random.Random(f"{seed} {subject}"))
        for subject in subjects
    }
    wishes = []
    for k in range(n):
        subject = subjects[k % len(subjects)]
        setting = orders[subject][k // len(subjects)]
        wishes.append(
            (
                {
                    "id": f"gen-{subject[-1][1].replace(' ', '-')}-{setting + 1:03d}",
                    **dict(subject),
                },
                settings[setting],
            )
        )
    return wishes


def read_reply(text, start):
    """(line, fault) from an LLM's reply: one JSON object, bare, in a code fence or after its thoughts, that completes the `start` of a line."""
    try:
        answer = json.loads(
            re.sub(r"(?s)^(<think>.*</think>)?\s*(```(json)?\s)?|\s*```$", "", text.strip())
        )
    except (ValueError, RecursionError):
        return None, "not one JSON object; reply with it and nothing else"
    fault = shape_fault(
        answer, {"personas": list} if "axis" in start else {"dilemma": str, "parties": list}
    )
    if fault:
        return None, fault
    tidy = lambda text: " ".join(text.split())
    if "axis" in start:
        row = {
            **start,
            "personas": [
                {"name": tidy(p["name"]), "creed": tidy(p["creed"])} for p in answer["personas"]
            ],
        }
        return row, line_fault(row, PAIR)
    row, parties = (
        {**start, "dilemma": tidy(answer["dilemma"])},
        {tidy(str(party)).lower() for party in answer["parties"]},
    )
    if len(parties) != 2 or not all(party and party in row["dilemma"].lower() for party in parties):
        return None, "parties not found in the dilemma; name two by words copied from it"
    return row, line_fault(row, DILEMMA)


class Lines:
    """A JSON Lines file that only grows: a whole line in one write with O_APPEND, then fsync. Opening it cuts off the half line
    that a killed run may have left at the end, and refuses a file of another kind."""

    def __init__(self, path, shape):
        self.path = path
        try:
            self.file = open(path, "ab+", buffering=0)
            if not stat.S_ISREG(os.fstat(self.file.fileno()).st_mode):
                raise UserError(f"--out {path}: not a plain file; name another one")
            fcntl.flock(
                self.file, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # two runs into one file would write the same lines
        except BlockingIOError:
            raise UserError(
                f"--out {path}: another run is writing to it; wait for it, or name another file"
            )
        except OSError as error:
            raise UserError(
                f"--out {path}: cannot be written ({error.strerror}); name another file"
            )
        self.file.seek(0)
        data = self.file.read()
        end = data.rfind(b"\n") + 1
        if not data[end:].startswith(b'{"id": "gen-'[: len(data) - end]):
            raise UserError(
                f"--out {path}: the last line is not ours and has no end; finish it, or name another file"
            )
        self.file.truncate(end)
        other = lambda row: (
            shape_fault(row, shape)
            or (set(row) != set(shape) and "holds other keys too; name another --out")
            or ""
        )
        self.rows = load_jsonl(path, other) if end else []

    def append(self, row):
        """Write one line, whole or not at all. Raises UserError when the disk is full."""
        line, before = (
            (json.dumps(row, ensure_ascii=False) + "\n").encode(),
            os.fstat(self.file.fileno()).st_size,
        )
        try:
            if os.write(self.file.fileno(), line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self.file.fileno())
        except OSError as error:
            self.file.truncate(before)
            raise UserError(
                f"--out {self.path}: cannot be written ({error.strerror}); make room and start again, it goes on where it was"
            )
        self.rows.append(row)


class Generator:
    """Asks, checks and writes; the workers of `client` share it. `out`: Lines of shape DILEMMA or PAIR."""

    def __init__(self, settings, shape, client, out):
        self.settings, self.client, self.out, self.memory, self.lock = (
            settings,
            client,
            out,
            Memory(),
            threading.Lock(),
        )
        self.accepted, self.skipped, self.dead, self.refused, self.failed = (
            0,
            0,
            0,
            collections.Counter(),
            collections.Counter(),
        )
        sets = {file: load_jsonl(DATA / file) for file in SETS}
        for file, rows in [*sets.items(), (out.path, out.rows)]:
            for row in rows:
                self.memory.add(file, row)
        shipped, there = (
            sets["dilemmas.jsonl" if shape is DILEMMA else "personas.jsonl"],
            {row["id"] for row in out.rows},
        )
        self.shown = shipped + out.rows  # no sealed line is ever shown to the LLM
        self.wishes = draw_wishes(shipped, settings.n, settings.seed)
        self.todo = [wish for wish in self.wishes if wish[0]["id"] not in there]

    def run(self):
        """Fulfil the wishes that the file does not answer yet. Returns 0, or 1 when something was to do and nothing was accepted."""
        with tqdm(
            total=len(self.wishes),
            initial=len(self.wishes) - len(self.todo),
            desc=self.out.path,
            unit=" wishes",
        ) as bar:
            for done in concurrent.futures.as_completed(
                [self.client.submit(self.fulfil, *wish) for wish in self.todo]
            ):
                self.skipped += not done.result()
                bar.update()
                bar.set_postfix(
                    accepted=self.accepted, refused=self.refused.total(), failed=self.failed.total()
                )
        told = [
            f"{n} {what}" + "".join(f", {reason}: {k}" for reason, k in why.most_common())
            for n, what, why in (
                (self.refused.total(), "replies refused", self.refused),
                (self.failed.total(), "requests failed", self.failed),
            )
        ]
        print(
            f"{self.out.path}: {len(self.out.rows)} lines, {self.accepted} of them new; {'; '.join(told)}; {self.skipped} wishes skipped"
            + (" (the same command tries them again)" if self.skipped else "")
        )
        return 1 if self.todo and not self.accepted else 0

    def fulfil(self, start, setting, _):
        """Ask until a reply is accepted and written, `tries` times at most; True when one was. Raises UserError: disk full, dead server."""
        fault = ""
        for _ in range(self.settings.tries):
            text = self.ask(self.prompt(start, setting, fault))
            if text is None:
                continue
            row, fault = read_reply(text, start)
            with self.lock:
                fault = fault or self.memory.fault(row)
                if not fault:
                    self.out.append(row)
                    self.memory.add(self.out.path, row)
                    self.shown.append(row)
                    self.accepted += 1
                    return True
                self.refused[re.split(r" \(|;", fault)[0]] += 1
        return False

    def prompt(self, start, setting, fault):
        """The request for a wish: with three lines of its kind to avoid, and what was wrong with the last reply."""
        alike = [
            row for row in self.shown if all(row[key] == start[key] for key in start if key != "id")
        ]
        avoid = "\n".join("- " + " / ".join(texts_of(row)) for row in alike[-3:])
        asked = fill(
            ASK_PAIR if "axis" in start else ASK_DILEMMA,
            {**start, "setting": setting, "avoid": avoid},
        )
        return asked + (f"\nYour last reply was refused: {fault}." if fault else "")

    def ask(self, prompt):
        """The LLM's reply, or None when there is none. Raises UserError when the server seems dead, and asks it no more."""
        payload = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.tokens,
        }
        limit = self.settings.concurrency + 3
        if self.dead < limit:
            try:
                text = self.client.ask(
                    "/chat/completions",
                    payload,
                    lambda reply: dig(reply, "choices", 0, "message", "content", kind=str),
                    time.monotonic() + self.settings.deadline,
                )
                self.dead = 0
                return text
            except Missing as miss:
                with self.lock:
                    self.failed[miss.reason] += 1
                    self.dead, self.last = self.dead + 1, f"{miss.reason} {miss.raw[:200]}"
        if self.dead >= limit:
            raise UserError(
                f"--url {self.client.url}: {limit} requests in a row failed ({self.last}); see to it, and start again"
            )
        return None


def main():
    """The command line."""
    command, argv = (sys.argv + [""])[1], sys.argv[2:]
    if command == "check":
        return check(command_line(CheckSettings, argv, "data_gen.py check"))
    if command not in ("dilemmas", "personas"):
        raise UserError(
            f"{command or 'no command'}: say python data_gen.py check, dilemmas or personas, and --help behind it"
        )
    settings, shape = (
        command_line(GenerateSettings, argv, f"data_gen.py {command}"),
        DILEMMA if command == "dilemmas" else PAIR,
    )
    if not settings.out:
        raise UserError("--out: names no file; say --out my.jsonl")
    if not settings.url:
        raise UserError("--url: names no server; say --url http://127.0.0.1:8000/v1")
    if not settings.model:
        raise UserError("--model: names no model; say which one the server is to use")
    with contextlib.ExitStack() as stack:
        out = Lines(settings.out, shape)
        stack.enter_context(out.file)
        try:
            client = stack.enter_context(
                contextlib.closing(
                    Client(settings.url, settings.concurrency, settings.timeout, settings.attempts)
                )
            )
        except UserError as error:
            raise UserError(str(error).replace("--judge-url", "--url"))
        return Generator(settings, shape, client, out).run()


if __name__ == "__main__":
    run_cli(main)
