"""Check the shipped data, and write more of it with any LLM.

    each line: form, length, pattern; all files together: likeness, seals       check()
    (tier, topic, setting) in turn -> LLM -> the same checks -> one more line   generate()

The same checks refuse a bad line of ours and of the LLM. They see form, length and word-for-word
likeness. Left out: a judge of quality; whether a dilemma is worth an hour, only a reader sees. And
a lock on --out: two runs into one file ask for the same lines, and load_jsonl names the double.

    python data_gen.py check
    python data_gen.py dilemmas --n 500 --out my.jsonl --url http://127.0.0.1:8000/v1 --model NAME
    python data_gen.py personas --n 25 --out pairs.jsonl --url ... --model ...  # JUDGE_API_KEY
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import re
import string
import sys

from tqdm import tqdm

from cli import UserError, command_line, option, run_cli
from client import LONGEST_WAIT, Client, Missing, dig
from dataset import DATA, DEMONSTRATION, load_jsonl, shape_fault, turns_fault
from measure import ngrams, words

DILEMMA = {"id": str, "tier": str, "topic": str, "dilemma": str}
PAIR = {"id": str, "axis": str, "personas": list}
LABEL = {"id": str, "scenario_id": str, "split": str, "source": str, "personas": list}
FILES = {  # shipped file: what a line holds
    "dilemmas.jsonl": DILEMMA,
    "personas.jsonl": PAIR,
    "eval_conflict.jsonl": DILEMMA | {"personas": list},
    "eval_open.jsonl": {"id": str, "topic": str, "question": str},
    "eval_general.jsonl": {"id": str, "prompt": str, "choices": list, "answer": int},
    "demonstrations.jsonl": DEMONSTRATION,
    "judge_labels.jsonl": LABEL | {"solution": str, "score": float, "endorse": list},
    "agreement_labels.jsonl": LABEL | {"turns": list, "agreed": bool},
}


# ---- likeness ---------------------------------------------------------------------------------

NEAR = 0.3  # word 5-gram Jaccard from which two texts count as the same


def grams(text):
    """The word 5-grams of a text, case and punctuation aside; a shorter text is one gram."""
    return set(ngrams([text], 5)) or {tuple(words(text))}


def jaccard(a, b):
    """|A & B| / |A | B| of two sets."""
    return len(a & b) / len(a | b)


def creeds_of(row):
    """The creeds in a line."""
    return [persona["creed"] for persona in row.get("personas", [])]


def texts_of(row):
    """[(what, text)] that a line adds: a demonstration borrows its personas, a label all of it."""
    texts = [(key, row[key]) for key in ("dilemma", "question", "prompt", "final") if key in row]
    if "final" in row:
        texts += [("turn", turn) for turn in row["turns"]]
    if "scenario_id" not in row:
        texts += [("creed", creed) for creed in creeds_of(row)]
    return texts


class Memory:
    """The texts that are there: nothing new may resemble them."""

    def __init__(self):
        self.holders = collections.defaultdict(list)  # 5-gram -> (text, its 5-grams)

    def add(self, row):
        """From now on nothing may resemble `row`."""
        for _, text in texts_of(row):
            own = grams(text)
            for gram in own:
                self.holders[gram].append((text, own))

    def nearest(self, text):
        """(likeness, text) of the one that is most like `text`; (0.0, "") if none is."""
        own = grams(text)
        nearest = (0.0, "")
        for gram in own & self.holders.keys():
            for known, other in self.holders[gram]:
                nearest = max(nearest, (jaccard(own, other), known))
        return nearest

    def fault(self, row):
        """Are the texts of `row` new?"""
        for what, text in texts_of(row):
            likeness, known = self.nearest(text)
            if likeness >= NEAR:
                return f"{what} like one that is there ({known[:60]}...); write it anew"
        return ""


# ---- check the shipped data: each line, then all files together --------------------------------

WORDS = {"dilemma": (40, 90), "creed": (20, 50), "turn": (15, 35), "final": (30, 60)}
WORDS |= {"question": (6, 40), "prompt": (3, 100)}  # at least, at most
PATTERNS = {
    "dilemma": (r"\?\s*$", "without a question at the end; end with the decision to be taken"),
    "creed": (r"(?i)\byou(r|rs|rself)?\b", "not in the second person; address the persona as you"),
}


def line_fault(row, shape):
    """Is it a line as good as the shipped ones? Returns what is wrong, or ""."""
    fault = shape_fault(row, shape)
    if "turns" in shape:
        fault = fault or turns_fault(row)
    if fault:
        return fault
    texts = texts_of(row)
    for what, text in texts:
        low, high = WORDS[what]
        count = len(text.split())
        if not low <= count <= high:
            return f"{what} of {count} words; write {low} to {high}"
        pattern, fault = PATTERNS.get(what, ("", ""))
        if not re.search(pattern, text):
            return f"{what} {fault}"
    for (what, one), (_, other) in itertools.combinations(texts, 2):
        if jaccard(grams(one), grams(other)) >= NEAR:
            return f"{what}s alike; they must say different things"
    return ""


def sealed_faults(sets):
    """Do demonstrations and labels know training data only? Is no dilemma in two parts of them?"""
    dilemmas = {row["id"] for row in sets["dilemmas.jsonl"]}
    pairs = [set(creeds_of(row)) for row in sets["personas.jsonl"]]
    parts = {}
    for file in ("demonstrations.jsonl", "judge_labels.jsonl", "agreement_labels.jsonl"):
        for number, row in enumerate(sets[file], 1):
            name, place = row["scenario_id"], f"{file}:{number}"
            if name not in dilemmas:
                yield f"{place}: {name} is no training dilemma; sealed ones must stay sealed"
            if set(creeds_of(row)) not in pairs:
                yield f"{place}: personas that are no pair of personas.jsonl; take one of its pairs"
            if "split" in row and parts.setdefault(name, row["split"]) != row["split"]:
                yield f"{place}: {name} is in both parts; keep a dilemma in one"


def variety_faults(sets):
    """Are tiers and topics spread evenly, the same in training and sealed? Do finals vary?"""
    for key in ("tier", "topic"):
        training = collections.Counter(row[key] for row in sets["dilemmas.jsonl"])
        sealed = collections.Counter(row[key] for row in sets["eval_conflict.jsonl"])
        if set(training) != set(sealed):
            yield f"dilemmas.jsonl and eval_conflict.jsonl: not the same {key}s; align them"
        for file, counts in (("dilemmas.jsonl", training), ("eval_conflict.jsonl", sealed)):
            fewest, most = min(counts.values()), max(counts.values())
            if most - fewest > 2:
                yield f"{file}: {key}s with {fewest} to {most} lines; make them all alike"
    rows = sets["demonstrations.jsonl"]
    openings = {" ".join(row["final"].lower().split()[:3]) for row in rows}
    if len(openings) < 0.8 * len(rows):
        found = f"{len(openings)} different openings of {len(rows)} joint solutions"
        yield f"demonstrations.jsonl: {found}; vary them"


def check(folder=DATA):
    """Verify the shipped files; 0 when all is well, else 1 and what is wrong."""
    sets = {file: load_jsonl(folder / file) for file in FILES}
    memory = Memory()
    faults = []
    for file, rows in sets.items():
        print(file, len(rows))
        for number, row in enumerate(rows, 1):
            fault = line_fault(row, FILES[file]) or memory.fault(row)
            if fault:
                faults.append(f"{file}:{number}: {fault}")
            else:
                memory.add(row)
    faults = faults or [*sealed_faults(sets), *variety_faults(sets)]  # of sound lines
    print("\n".join(["wrong:", *faults] if faults else ["all sound"]))
    return 1 if faults else 0


# ---- write more with an LLM -------------------------------------------------------------------

TIMEOUT = 120.0  # seconds of one attempt of a request
PATIENCE = 20  # replies of no use in a row


@dataclasses.dataclass(frozen=True)
class GenerateSettings:
    """How many lines to make, where, and by whom."""

    n: int = option(100, "lines to ask for; refused ones are asked again by another run", low=1)
    out: str = option("", "JSON Lines file to write; what is there already is kept and continued")
    url: str = option("", "OpenAI-compatible server, http://host:port/v1")
    model: str = option("", "name of the model on that server")
    tokens: int = option(400, "tokens that a reply may have", low=64)
    concurrency: int = option(4, "requests in flight at most", low=1, high=1000)


def subject_of(row):
    """What a line is about: tier and topic of a dilemma, axis of a pair."""
    return tuple((key, row[key]) for key in ("tier", "topic", "axis") if key in row)


def draw_wishes(shipped, n):
    """[(start of a line, setting)], `n` of them, that take the subjects of `shipped` in turn.

    The id follows from the wish, so that a file tells what it answers.
    """
    settings = (DATA / "settings.txt").read_text(encoding="utf-8").splitlines()
    subjects = list(dict.fromkeys(map(subject_of, shipped)))
    wishes = []
    for k in range(n):
        lap, place = divmod(k, len(subjects))
        subject = subjects[place]
        name = subject[-1][1].replace(" ", "-")
        start = {"id": f"gen-{name}-{lap + 1:03d}"} | dict(subject)
        wishes.append((start, settings[(k + lap) % len(settings)]))
    return wishes


def write_prompt(command, start, setting, shown):
    """A wish in words, with three lines of its subject to avoid."""
    alike = [row for row in shown if subject_of(row) == subject_of(start)]
    avoid = ["- " + " / ".join(text for _, text in texts_of(row)) for row in alike[-3:]]
    template = string.Template((DATA / f"ask_{command}.txt").read_text(encoding="utf-8"))
    return template.substitute(start, setting=setting, avoid="\n".join(avoid))


def read_reply(text, start, shape):
    """(line, what is wrong) from a reply: the first { to the last }, behind any thoughts."""
    answer = text.rpartition("</think>")[2]
    answer = answer[answer.find("{") : answer.rfind("}") + 1]
    try:
        values = json.loads(" ".join(answer.split())) | start
    except (ValueError, RecursionError):
        return None, "not one JSON object; reply with it and nothing else"
    row = {key: values[key] for key in shape if key in values}
    return row, line_fault(row, shape)


def generate(command, settings, client):
    """Ask for the lines that --out lacks, and write those that are sound and new as they come."""
    shape = FILES[f"{command}.jsonl"]
    shipped = load_jsonl(DATA / f"{command}.jsonl")
    memory = Memory()
    for file in FILES:
        for row in load_jsonl(DATA / file):
            memory.add(row)
    with open(settings.out, "a", encoding="utf-8", buffering=1) as out:  # a line at a time
        written = []
        if out.tell():  # not empty
            written = load_jsonl(settings.out, lambda row: shape_fault(row, shape))
        for row in written:
            memory.add(row)
        answered = {row["id"] for row in written}
        asked = {}  # Future of a reply -> start of its line
        for start, setting in draw_wishes(shipped, settings.n):
            if start["id"] not in answered:
                prompt = write_prompt(command, start, setting, shipped + written)
                asked[submit(client, settings, prompt)] = start
        new = collect(asked, settings, shape, memory, out)
    print(f"{settings.out}: {len(written) + new} lines, {new} of them new")


def submit(client, settings, prompt):
    """A Future of the LLM's reply, which raises Missing."""
    message = {"role": "user", "content": prompt}
    return client.submit(
        client.ask,
        "/chat/completions",
        {"model": settings.model, "messages": [message], "max_tokens": settings.tokens},
        lambda reply: dig(reply, "choices", 0, "message", "content", kind=str),
    )


def collect(asked, settings, shape, memory, out):
    """Write the lines that are sound and new, as they come; returns how many they are."""
    new = useless = 0  # useless: replies in a row
    coming = concurrent.futures.as_completed(asked)
    for future in tqdm(coming, settings.out, len(asked), unit=" replies"):
        start = asked[future]
        try:
            row, fault = read_reply(future.result(), start, shape)
        except Missing as miss:
            row, fault = None, f"{miss.reason} {miss.raw[:200]}"
        fault = fault or memory.fault(row)
        if fault:
            tqdm.write(f"{start['id']} not written: {fault}")
            useless += 1
        else:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            memory.add(row)
            new += 1
            useless = 0
        if useless == PATIENCE:
            why = f"{useless} replies in a row are of no use, the last: {fault}"
            raise UserError(f"--url {settings.url}: {why}; see to it and start again")
    return new


def main():
    """The command line."""
    command, *argv = sys.argv[1:] or [""]
    if command == "check":
        return check()
    if command not in ("dilemmas", "personas"):
        raise UserError("say data_gen.py check, dilemmas or personas, and --help behind it")
    settings = command_line(GenerateSettings, argv, f"data_gen.py {command}")
    if not (settings.out and settings.url and settings.model):
        raise UserError(f"data_gen.py {command} needs --out, --url and --model")
    client = Client(settings.url, settings.concurrency, TIMEOUT, batch_seconds=LONGEST_WAIT)
    try:
        with contextlib.closing(client):
            generate(command, settings, client)
    except OSError as error:
        place = error.filename or f"--out {settings.out}"
        hint = "mend that and start again, it goes on where it was"
        raise UserError(f"{place}: {error.strerror}; {hint}") from error


if __name__ == "__main__":
    run_cli(main)
