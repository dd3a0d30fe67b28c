"""Check the shipped data, and write more of it with any LLM.

    each line: form, length, pattern; all files together: likeness, seals, variety    check()
    (tier, topic, setting) drawn by seed -> LLM -> the same checks -> one more line   generate()

The same checks refuse a bad line of ours and of the LLM. They see form, length and word-for-word
likeness. Left out: a judge of quality; whether a dilemma is worth an hour, only a reader sees. And
a lock on --out: two runs into one file ask for the same lines, and load_scenarios names the double.

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
import random
import re
import string
import sys
import time
from pathlib import Path

from tqdm import tqdm

from cli import UserError, command_line, option, run_cli
from client import LONGEST_WAIT, Client, Missing, dig
from dataset import DATA, DEMONSTRATION, load_jsonl, shape_fault, shuffled, turns_fault
from measure import ngrams, words

DILEMMA = {"id": str, "tier": str, "topic": str, "dilemma": str}
PAIR = {"id": str, "axis": str, "personas": list}
LABEL = {"id": str, "scenario_id": str, "split": str, "source": str, "personas": list}
FILES = {  # shipped file: (how many lines, what a line holds)
    "dilemmas.jsonl": (320, DILEMMA),
    "personas.jsonl": (25, PAIR),
    "eval_conflict.jsonl": (100, DILEMMA | {"personas": list}),
    "eval_open.jsonl": (100, {"id": str, "topic": str, "question": str}),
    "eval_general.jsonl": (35, {"id": str, "prompt": str, "choices": list, "answer": int}),
    "demonstrations.jsonl": (640, DEMONSTRATION),
    "judge_labels.jsonl": (2480, LABEL | {"solution": str, "score": float, "endorse": list}),
    "agreement_labels.jsonl": (890, LABEL | {"turns": list, "agreed": bool}),
}
# whose scenarios and personas are those of training, and the files that hold texts of their own
BORROWERS = ("demonstrations.jsonl", "judge_labels.jsonl", "agreement_labels.jsonl")
TEXTS = [file for file in FILES if file not in BORROWERS]


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


def names_of(row):
    """The id that a line adds, and the names of its personas without "the ..." behind a comma."""
    names = {row["id"]} if "id" in row else set()
    if "scenario_id" not in row:
        names |= {p["name"].split(",")[0].strip().lower() for p in row.get("personas", [])}
    return names


class Memory:
    """The lines that are there: nothing new may resemble them."""

    def __init__(self):
        self.holders = collections.defaultdict(list)  # 5-gram -> (place, 5-grams) of texts with it
        self.names = set()

    def add(self, place, row):
        """From now on nothing may resemble `row`, which stands at `place`."""
        self.names |= names_of(row)
        for _, text in texts_of(row):
            own = grams(text)
            for gram in own:
                self.holders[gram].append((place, own))

    def add_file(self, file, rows):
        """From now on nothing may resemble the lines of a file."""
        for number, row in enumerate(rows, 1):
            self.add(f"{file}:{number}", row)

    def nearest(self, text):
        """(likeness, place) of the text that is most like this one; (0.0, "") if none is."""
        own = grams(text)
        nearest = (0.0, "")
        for gram in own & self.holders.keys():
            for place, other in self.holders[gram]:
                nearest = max(nearest, (jaccard(own, other), place))
        return nearest

    def fault(self, row):
        """Is `row` new: its texts, its id and the names of its personas?"""
        for _, text in texts_of(row):
            likeness, place = self.nearest(text)
            if likeness >= NEAR:
                return f"near-duplicate ({place}); write it anew"
        taken = ", ".join(sorted(names_of(row) & self.names))
        return f"name or id already taken ({taken}); choose another" if taken else ""


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
    if "score" in shape:
        fault = fault or rating_fault(row)
    return fault or text_fault(row)


def text_fault(row):
    """Has each text of a line its length and pattern, and do they differ?"""
    texts = texts_of(row)
    for what, text in texts:
        low, high = WORDS[what]
        count = len(text.split())
        if not low <= count <= high:
            size = "short" if count < low else "long"
            return f"{what} too {size} ({count} words); write {low} to {high}"
        pattern, fault = PATTERNS.get(what, ("", ""))
        if not re.search(pattern, text):
            return f"{what} {fault}"
    if "final" in row and len(row["turns"]) > 4:
        return f"{len(row['turns'])} turns; write 2 to 4"
    for (what, one), (_, other) in itertools.combinations(texts, 2):
        if jaccard(grams(one), grams(other)) >= NEAR:
            return f"{what}s alike; they must say different things"
    return ""


def rating_fault(row):
    """Are the ratings of a label half points from 0 to 5?"""
    half_points = [n / 2 for n in range(11)]
    if all(rating in half_points for rating in [row["score"], *row["endorse"]]):
        return ""
    return "a rating that is no half point from 0 to 5; correct it"


def likeness_faults(sets):
    """Is each id, text and name new?"""
    memory = Memory()
    for file, rows in sets.items():
        for number, row in enumerate(rows, 1):
            place = f"{file}:{number}"
            if fault := memory.fault(row):
                yield f"{place}: {fault}"
            memory.add(place, row)


def sealed_faults(sets):
    """Do demonstrations and labels know training data only? Is no dilemma in two parts of them?"""
    dilemmas = {row["id"] for row in sets["dilemmas.jsonl"]}
    pairs = [set(creeds_of(row)) for row in sets["personas.jsonl"]]
    missing = dilemmas - {row["scenario_id"] for row in sets["demonstrations.jsonl"]}
    if missing:
        yield f"demonstrations.jsonl: none for {', '.join(sorted(missing))}; write them"
    parts = {}
    for file in BORROWERS:
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
    sets = {}
    faults = []
    for file, (count, shape) in FILES.items():
        try:
            sets[file] = load_jsonl(folder / file)
        except UserError as error:
            faults.append(str(error))
            continue
        for number, row in enumerate(sets[file], 1):
            fault = line_fault(row, shape)
            if fault:
                faults.append(f"{file}:{number}: {fault}")
        print(f"{file} {len(sets[file])}")
        if len(sets[file]) != count:
            faults.append(f"{file}: {len(sets[file])} lines instead of {count}; correct either")
    text = folder / "public_domain.txt"
    if not text.is_file() or len(text.read_bytes().split()) < 1000:
        faults.append("public_domain.txt: missing, or shorter than 1000 words; put it back")
    if not faults:  # each line is sound: compare them
        faults = [*likeness_faults(sets), *sealed_faults(sets), *variety_faults(sets)]
    print("\n".join(["wrong:", *faults] if faults else ["all sound"]))
    return 1 if faults else 0


# ---- write more with an LLM -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GenerateSettings:
    """How many lines to make, where, and by whom."""

    n: int = option(100, "lines to ask for; refused ones are asked again by another run", low=1)
    out: str = option("", "JSON Lines file to write; what is there already is kept and continued")
    url: str = option("", "OpenAI-compatible server, http://host:port/v1")
    model: str = option("", "name of the model on that server")
    seed: int = option(0, "of the drawing of wishes", low=0)
    temperature: float = option(1.0, "of the LLM", low=0)
    tokens: int = option(400, "tokens that a reply may have", low=64)
    concurrency: int = option(4, "requests in flight at most", low=1, high=1000)
    timeout: float = option(
        120.0, "seconds that one attempt of a request may take", above=0, high=LONGEST_WAIT
    )


def subject_of(row):
    """What a line is about: tier and topic of a dilemma, axis of a pair."""
    return tuple((key, row[key]) for key in ("tier", "topic", "axis") if key in row)


def draw_wishes(shipped, n, seed):
    """[(start of a line, setting)], `n` of them, that take the subjects of `shipped` in turn.

    No (subject, setting) comes twice, and the id follows from them: a file tells what it answers.
    """
    settings = (DATA / "settings.txt").read_text(encoding="utf-8").splitlines()
    subjects = shuffled(dict.fromkeys(map(subject_of, shipped)), random.Random(seed))
    most = len(subjects) * len(settings)
    if n > most:
        hint = "ask for fewer, or add lines to data/settings.txt"
        raise UserError(f"--n {n}: there are {most} different wishes; {hint}")
    wishes = []
    for subject in subjects:
        order = shuffled(range(len(settings)), random.Random(f"{seed} {subject}"))
        name = subject[-1][1].replace(" ", "-")
        ids = [f"gen-{name}-{k + 1:03d}" for k in order]
        wishes.append([({"id": i} | dict(subject), settings[k]) for i, k in zip(ids, order)])
    in_turn = itertools.chain.from_iterable(zip(*wishes))
    return list(itertools.islice(in_turn, n))


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


OURS = b'{"id": "gen-'  # how a line of ours begins


def open_output(path, shape):
    """The lines of earlier runs; the half line that a broken one may have left is cut off.

    A file without lines is not kept: it comes with the first one.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"--out {path}: not a plain file; name another one")
    with open(path, "a+b") as file:
        file.seek(0)
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if len(data) > whole and not data[whole:].startswith(OURS):
            raise UserError(f"--out {path}: its last line has no end; mend it or take it out")
        file.truncate(whole)
    if not whole:
        Path(path).unlink()
    rows = load_jsonl(path, lambda row: shape_fault(row, shape)) if whole else []
    if any(set(row) != set(shape) for row in rows):
        raise UserError(f"--out {path}: lines with other keys than ours; name another one")
    return rows


def generate(command, settings, client):
    """Ask for the lines that --out lacks. Returns 0, or 1 when some were lacking and none came."""
    shape = FILES[f"{command}.jsonl"][1]
    shipped = load_jsonl(DATA / f"{command}.jsonl")
    written = open_output(settings.out, shape)
    memory = Memory()
    for file in TEXTS:
        memory.add_file(file, load_jsonl(DATA / file))
    memory.add_file(settings.out, written)
    ids = {row["id"] for row in written}
    shown = shipped + written
    prompts = []
    for start, setting in draw_wishes(shipped, settings.n, settings.seed):
        if start["id"] not in ids:
            prompts.append((start, write_prompt(command, start, setting, shown)))
    collect(prompts, settings, client, shape, written, memory)
    print(f"{settings.out}: {len(written)} lines, {len(written) - len(ids)} of them new")
    return 1 if prompts and len(written) == len(ids) else 0


def replies(prompts, settings, client):
    """(start of a line, Future of the reply) as they come, with `concurrency` asked for at a time.

    What is not taken is not asked for: a dead server sees few requests before the run stops.
    """
    waiting = iter(prompts)
    asked = {}  # Future -> start of the line
    while True:
        for start, prompt in itertools.islice(waiting, settings.concurrency - len(asked)):
            asked[client.submit(ask, client, settings, prompt)] = start
        if not asked:
            return
        done, _ = concurrent.futures.wait(asked, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
            yield asked.pop(future), future


def collect(prompts, settings, client, shape, written, memory):
    """Write the lines that are sound and new, as they come; say what is wrong with the others."""
    failed = 0  # requests in a row
    coming = replies(prompts, settings, client)
    for start, future in tqdm(coming, settings.out, len(prompts), unit=" replies"):
        try:
            row, fault = read_reply(future.result(), start, shape)
            fault = fault or memory.fault(row)
            failed = 0
        except Missing as miss:
            fault = f"{miss.reason} {miss.raw[:200]}"
            failed += 1
        if failed == settings.concurrency + 3:
            why = f"{failed} requests in a row failed ({fault})"
            raise UserError(f"--url {settings.url}: {why}; see to it and start again")
        if fault:
            tqdm.write(f"{start['id']} not written: {fault}")
            continue
        with open(settings.out, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        written.append(row)
        memory.add(f"{settings.out}:{len(written)}", row)


def write_prompt(command, start, setting, shown):
    """A wish in words, with three lines of its subject to avoid."""
    alike = [row for row in shown if subject_of(row) == subject_of(start)]
    avoid = ["- " + " / ".join(text for _, text in texts_of(row)) for row in alike[-3:]]
    template = string.Template((DATA / f"ask_{command}.txt").read_text(encoding="utf-8"))
    return template.substitute(start, setting=setting, avoid="\n".join(avoid))


def ask(client, settings, prompt, _):
    """The LLM's reply, in one of the client's threads. Raises Missing."""
    message = {"role": "user", "content": prompt}
    payload = {"model": settings.model, "messages": [message]}
    payload |= {"temperature": settings.temperature, "max_tokens": settings.tokens}
    return client.ask(
        "/chat/completions",
        payload,
        lambda reply: dig(reply, "choices", 0, "message", "content", kind=str),
        time.monotonic() + 3 * settings.timeout,  # for all attempts together
    )


def main():
    """The command line."""
    command, argv = (sys.argv + [""])[1], sys.argv[2:]
    if command == "check" and argv:
        raise UserError(f"check {argv[0]}: check takes no flags")
    if command == "check":
        return check()
    if command not in ("dilemmas", "personas"):
        hint = "say python data_gen.py check, dilemmas or personas, and --help behind it"
        raise UserError(f"{command or 'no command'}: {hint}")
    settings = command_line(GenerateSettings, argv, f"data_gen.py {command}")
    for flag in ("out", "url", "model"):
        if not getattr(settings, flag):
            raise UserError(f"--{flag}: missing; python data_gen.py {command} --help says more")
    try:
        client = Client(settings.url, settings.concurrency, settings.timeout)
        with contextlib.closing(client):
            return generate(command, settings, client)
    except UserError as error:
        raise UserError(str(error).replace("--judge-url", "--url")) from error
    except OSError as error:
        hint = "mend that and start again, it goes on where it was"
        shipped = str(error.filename).startswith(str(DATA))
        place = error.filename if shipped else f"--out {settings.out}"
        raise UserError(f"{place}: {error.strerror}; {hint}") from error


if __name__ == "__main__":
    run_cli(main)
