"""The data: JSON Lines in, scenarios and demonstrations out; every error names its line.

    dilemmas.jsonl + personas.jsonl, combined by seed    ->  Scenarios       load_scenarios()
    a FILE whose lines have personas, used as it is      ->  Scenarios       load_scenarios(FILE)
    demonstrations.jsonl, negotiations that were written ->  Demonstrations  load_demonstrations()

Only the form of a line is checked here, of our files and of anybody's. Left out: whether a shipped
line is good enough, and how more are written; data_gen.py knows that.
"""

import contextlib
import dataclasses
import json
import random
import re
from pathlib import Path

from cli import UserError

DATA = Path(__file__).resolve().parent / "data"
DEMONSTRATION = {"scenario_id": str, "personas": list, "turns": list, "agreed": bool, "final": str}


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What is negotiated: a dilemma, and two personas {name, creed} in speaking order."""

    id: str
    tier: str
    dilemma: str
    personas: tuple


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A written negotiation, to be imitated; scenario.personas[0] says the first of the turns."""

    scenario: Scenario
    turns: tuple  # of texts
    agreed: bool
    final: str


# ---- JSON: every error names its file; of JSON Lines, its line -----------------------------------


@contextlib.contextmanager
def reading_json(what, hint):
    """Inside this block, whatever a damaged JSON file leads to is a UserError: WHAT, why, HINT."""
    damaged = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
    try:
        yield
    except (*damaged, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"{what} cannot be read ({reason}); {hint}") from error


def load_jsonl(path, fault_of=lambda row: "") -> list:
    """The values of a JSON Lines file; `fault_of(row)` says what is wrong with one ("": nothing).

    Raises UserError: "FILE:LINE: what is wrong; what to do", for an id that occurs twice, too.
    """
    hint = "pass a JSON Lines file, one JSON object per line"
    with reading_json(f"{path}:", hint):
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    rows = []
    ids = set()
    for number, line in enumerate(lines, 1):  # not splitlines: a JSON text may hold U+2028
        if not line.strip():
            continue
        with reading_json(f"{path}:{number}:", hint):
            row = json.loads(line)
        fault = fault_of(row)
        if not fault and type(row) is dict and type(row.get("id")) is str:
            if row["id"] in ids:
                fault = f'id "{row["id"]}" occurs twice; give every line an id of its own'
            ids.add(row["id"])
        if fault:
            raise UserError(f"{path}:{number}: {fault}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: empty; {hint}")
    return rows


# ---- the form of a line: these functions return "what is wrong; what to do", or "" -------------

TYPES = {str: "text", list: "a list", dict: "an object", int: "a number", float: "a number"}
TYPES |= {bool: "true or false", type(None): "null"}


def shape_fault(row, shape: dict) -> str:
    """Is it an object that holds `shape` = {key: type}, and two personas under "personas"?"""
    if type(row) is not dict:
        return f"{TYPES[type(row)]} instead of an object; write {{...}} with {', '.join(shape)}"
    for key, kind in shape.items():
        if key not in row:
            return f'no "{key}"; needed are {", ".join(shape)}'
        value = row[key]
        if type(value) not in ((int, float) if kind is float else (kind,)):
            return f'"{key}" is {TYPES[type(value)]} instead of {TYPES[kind]}; correct it'
        if kind is str and not is_text(value):
            return f'"{key}" is empty, or holds half a character; correct it or take the line out'
    return personas_fault(row["personas"]) if "personas" in shape else ""


def is_text(value):
    """Is it a text with something in it, and no lone surrogate, which no file can hold?"""
    return type(value) is str and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)


def personas_fault(personas):
    """Are they two, with different names?"""
    if len(personas) != 2:
        count = len(personas)
        return f'"personas" holds {count} instead of two; give two objects with a name and a creed'
    for number, persona in enumerate(personas, 1):
        fault = shape_fault(persona, {"name": str, "creed": str})
        if fault:
            return f"persona {number}: {fault}"
    if personas[0]["name"] == personas[1]["name"]:
        return "both personas have the same name; change one"
    return ""


def turns_fault(row):
    """Are the turns two texts or more?"""
    turns = row["turns"]
    if len(turns) < 2:
        return f'"turns" holds {len(turns)}; a negotiation has at least two'
    for turn in turns:
        if not is_text(turn):
            return f'"turns" holds {json.dumps(turn)[:40]}; write each turn as a text'
    return ""


# ---- scenarios and demonstrations -------------------------------------------------------------


def shuffled(items, rng):
    """A random order that is the same on every Python: only `random()` itself is sure to stay."""
    return sorted(items, key=lambda _: rng.random())


def spread(items: list, n: int) -> list:
    """`n` of the items, evenly spaced, so that each part of an ordered file has its share; 0: all.

    Multiples of the golden ratio, modulo 1, fill the unit interval evenly: so the items whose
    multiple is small lie evenly too, and a larger `n` only adds some.
    """
    chosen = sorted(range(len(items)), key=lambda i: i * 0.6180339887498949 % 1)[: n or None]
    return [items[i] for i in sorted(chosen)]


def load_scenarios(path=None, seed=0) -> list[Scenario]:
    """The scenarios of a JSON Lines file (None: the shipped dilemmas), in the file's order.

    Lines {id, tier, dilemma, personas} are used as they are; to those without personas pairs of
    personas.jsonl are dealt by seed. Raises UserError as `load_jsonl`.
    """

    def fault_of(row):
        """What is wrong with a line; "" if nothing is."""
        own = {"personas": list} if type(row) is dict and "personas" in row else {}
        return shape_fault(row, {"id": str, "tier": str, "dilemma": str} | own)

    rows = load_jsonl(path or DATA / "dilemmas.jsonl", fault_of)
    deal_personas([row for row in rows if "personas" not in row], seed)
    scenarios = []
    for row in rows:
        pair = tuple({"name": p["name"], "creed": p["creed"]} for p in row["personas"])
        scenarios.append(Scenario(row["id"], row["tier"], row["dilemma"], pair))
    return scenarios


def deal_personas(rows, seed):
    """Give each row a shipped pair, in seeded rounds; who speaks first changes by round."""
    shape = {"personas": list}
    shipped = load_jsonl(DATA / "personas.jsonl", lambda row: shape_fault(row, shape))
    pairs = [row["personas"] for row in shipped]
    rng = random.Random(seed)
    swapped = [rng.random() < 0.5 for _ in pairs]
    order = []
    for row in rows:
        order = order or shuffled(range(len(pairs)), rng)
        k = order.pop(0)
        row["personas"] = pairs[k][::-1] if swapped[k] else pairs[k]
        swapped[k] = not swapped[k]


def load_demonstrations(path=None, scenarios=None) -> list[Demonstration]:
    """The negotiations of a JSON Lines file (None: the shipped one), each line a DEMONSTRATION.

    The dilemma of a line is that of its scenario_id in the file `scenarios` (None: the shipped
    dilemmas). Raises UserError as `load_jsonl` does.
    """
    known = {scenario.id: scenario for scenario in load_scenarios(scenarios)}

    def fault_of(row):
        """What is wrong with a line; "" if nothing is."""
        fault = shape_fault(row, DEMONSTRATION)
        if fault:
            return fault
        if row["scenario_id"] not in known:
            file = scenarios or "data/dilemmas.jsonl"
            hint = "correct it, or name its file with --scenarios"
            return f'scenario_id "{row["scenario_id"]}" is not in {file}; {hint}'
        return turns_fault(row)

    demonstrations = []
    for row in load_jsonl(path or DATA / "demonstrations.jsonl", fault_of):
        scenario = dataclasses.replace(known[row["scenario_id"]], personas=tuple(row["personas"]))
        turns = tuple(turn.strip() for turn in row["turns"])
        demonstrations.append(Demonstration(scenario, turns, row["agreed"], row["final"].strip()))
    return demonstrations
