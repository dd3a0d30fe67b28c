"""Evaluation: does A negotiate better than B?

    conflict   A (and B) negotiate on sealed scenarios: scores, agreement, texts, A against B
    open       A (and B) answer open questions alone, and the same pairs
    general    multiple choices, and the token loss on a fixed text: no judge
    cross      partners swapped: A with B, B with A, and A with scripted partners who never give way
    audit      the judge itself: asked twice, against labels, length and a second judge (audit.py)
    blind      a sheet of both sides' solutions, shuffled, for people to rate (audit.py)
    report     a run as one HTML page (report.py)

    python eval.py conflict --model runs/debug-0 --baseline negotiator-135m --seeds 2

    settings -> two Sides -> items (played, judged, written at once) -> ResultRows with intervals

A and B get the same scenarios with the same seeds. A run that was killed goes on where it was:
start it again. Left out: downloads (IFEval, AIME, GPQA), Elo.
"""

import dataclasses
import functools
import itertools
import json
import sys
import zlib

import numpy as np
import torch
from tqdm import tqdm

import audit
import dataset
import model as lm
import report
import reward
import sampler
import selfplay
from attention import Tree
from cli import UserError, run_cli
from dataset import DATA
from measure import diversity, figure, minus, text_measures
from sides import Items, Side, picked, read_sides, refuse_lost, rows_of, scenarios_of, verdicts

# ---- negotiations and answers --------------------------------------------------------------------

TOKENS = {"streams", "final_ids", "final_sample", "advantage", "step", "group"}  # of a record


def played(voices, pairs, settings, judge, seed, partner=None):
    """Play (scenario, seed number) pairs in one batch: records as in dialogues.jsonl, judged."""
    dialogues = [selfplay.Dialogue(scenario, 0, i, k) for i, (scenario, k) in enumerate(pairs)]
    judge.start_batch()
    with tqdm(total=len(dialogues), desc="dialogues", leave=False) as bar:
        selfplay.play(
            voices, dialogues, settings, judge, seed, partner, on_done=lambda _: bar.update()
        )
    for dialogue in dialogues:
        dialogue.take_verdict()
    return [dialogue.record() for dialogue in dialogues]


def negotiations(pair, settings, judge, partner, pairs):
    """A pair of Sides plays: records with endorsements, and without tokens."""
    judge.check_agreement(settings)
    voices = pair[0].voice, pair[1].voice
    records = played(voices, pairs, settings, judge, settings.seed, partner)
    records = [picked(record, record.keys() - TOKENS) for record in records]
    finished = [record for record in records if record["final"] is not None]
    refuse_lost(["".join(record["judge"]["failures"]) for record in finished])
    endorse(finished, judge)
    return records


def endorse(records, judge):
    """Add to each record how satisfied each persona on its own is with the final: two numbers."""
    if not judge.can("endorse"):
        return
    asked = []
    for record in records:
        for persona in record["personas"]:
            asked.append(judge.endorse(record["dilemma"], persona, record["final"]))
    said = iter(verdicts(asked))
    for record in records:
        record["endorse"] = [next(said).value for _ in record["personas"]]


def heldout(voice, scenarios, settings, judge, samples=2, seed=0, share=slice(None)):
    """For run.py: records of `samples` dialogues on each scenario, with the same seeds each time.

    share: which of them this rank plays. A judge who is away costs rewards (None), never the run.
    """
    pairs = list(itertools.product(scenarios, range(samples)))[share]
    settings = dataclasses.replace(settings, on_impasse="complete")
    return played((voice, voice), pairs, settings, judge, seed)


def heldout_row(records):
    """The metrics of `heldout` records: reward with its interval and counts, agreement, texts."""
    row = figure("reward", "", [(r["scenario_id"], r["reward"]) for r in records])
    return {
        "reward": row.value,
        "reward_low": row.low,
        "reward_high": row.high,
        "n": row.n,
        "scenarios": row.scenarios,
        "missing": row.missing,
        "agreed_rate": float(np.mean([r["agreed"] for r in records])),
        "turns_mean": float(np.mean([len(r["turns"]) for r in records])),
        **diversity(records),
    }


HELPER = "You are a helpful assistant."  # the system text of open and general


def asked_alone(voice, prompt):
    """Ids of a prompt, a user's message, up to where the answer begins."""
    return voice.chat.asked("", voice.chat.prompt_parts(HELPER, prompt))


@torch.no_grad()
def answers(voice, prompts, limit, temperature, top_p, seeds):
    """One answer to each prompt as a chat.Turn, all in one batch, each with its own seed."""
    table = sampler.Table(voice, len(prompts))
    says = []
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        numbers = np.random.default_rng(seed)
        say = sampler.Say(0, asked_alone(voice, prompt), limit, temperature, top_p, numbers)
        say.begin(table, row)
        says.append(say)
    while live := [say for say in says if not say.done()]:
        sampler.speak(sampler.choose_batch(live))
    return [say.turn for say in says]


def mean_logprobs(voice, prefix, continuations):
    """Mean log-prob per token of each continuation of a prefix, both of them ids."""
    wanted = [list(range(len(continuation))) for continuation in continuations]
    with torch.no_grad():
        found = lm.token_logprobs(voice.model, Tree(prefix, continuations), wanted)
    return [logprobs.mean().item() for logprobs in found]


# ---- A against B ---------------------------------------------------------------------------------

QUESTIONS = {
    "ca": "Which solution serves the value that is defined above better?",
    "conflict": "Which solution resolves the conflict between the two parties better: fair to "
    "both, concrete, something both can carry out?",
}
JUDGED = ("ca_score", "endorse_min", "endorse_first")  # figures that a judge was asked for


def each_side(sides, items, judge, kind, rows, work, seeds=None):
    """{side: values of work(side, judge, [(row, seed number), ...])} for rows {id: row}."""
    values = {}
    for name, side in sides.items():
        tries = side.settings.best_of
        pairs = itertools.product(rows.items(), range((seeds or side.settings.seeds) * tries))
        todo = {(side.id, kind, row_id, k): (row, k) for (row_id, row), k in pairs}
        found = items.finish(f"{kind}, {name}", todo, functools.partial(work, side, judge))
        values[name] = best_of(tries, found) if tries > 1 else found
    return values


def best_of(tries, records):
    """The best by the judge of each `tries` records in a row, numbered as the other side's."""
    chosen = []
    for start in range(0, len(records), tries):
        best = max(records[start : start + tries], key=report.rank_of)
        chosen.append({**best, "member": best["member"] // tries})
    return chosen


def measured(records):
    """{(scenario, seed number): {figure: number or None}} of records, a column for `table`."""
    column = {}
    for record in records:
        turns = record["turns"]
        endorsed = record.get("endorse") or [None, None]
        cut = [turn["truncated"] for turn in turns] + [record["final_truncated"]]
        column[record["scenario_id"], record["member"]] = {
            "ca_score": record["reward"],
            "endorse_min": None if None in endorsed else min(endorsed),
            "endorse_first": endorsed[0],
            "agreed": float(record["agreed"]) if turns else None,
            "turns_to_agreement": len(turns) if record["agreed"] else None,
            "truncated": sum(cut) / len(cut),
            **text_measures(record),
        }
    return column


def table(columns, differences=(("A", "B"),)):
    """Rows of each figure of {column: {(scenario, seed): {figure: number}}}, and of differences."""
    rows = []
    first_column, *_ = columns.values()
    for name in next(iter(first_column.values()), {}):
        given = {}  # {what the row is of: [(scenario, number)]}
        for of, column in columns.items():
            given[of] = [(key[0], item[name]) for key, item in column.items()]
        for one, other in differences:
            if one in columns and other in columns:
                pairs = zip(given[one], given[other], strict=True)
                given[f"{one} - {other}"] = [(s, minus(a, b)) for (s, a), (_, b) in pairs]
        if any(number is not None for _, number in itertools.chain(*given.values())):
            for of, pairs in given.items():
                kept = [pair for pair in pairs if name in JUDGED or pair[1] is not None]
                rows.append(figure(name, of, kept))
    return rows


def outcome(first, second):
    """How A against B ended by the answers to (A, B) and to (B, A): a win needs both."""
    if None in (first, second):
        return "missing"
    decided = {("A", "B"): "wins", ("B", "A"): "losses", ("tie", "tie"): "ties"}
    return decided.get((first, second), "inconsistent")


def win_rate(name, outcomes):
    """The ResultRow of wins / (wins + losses), with all counts, of (scenario, outcome) pairs."""
    kinds = ("wins", "losses", "ties", "inconsistent", "missing")
    counts = {kind: sum(what == kind for _, what in outcomes) for kind in kinds}
    decided = [(s, float(what == "wins")) for s, what in outcomes if what in ("wins", "losses")]
    return figure(name, "A against B", decided, pairs=len(outcomes), **counts)


def against(name, pairs, sides, items, judge):
    """The win rate of A against B by a judge, who sees both finals in both orders."""

    def work(cases):
        """The judge's answers to pairs of finals, (A first, B first) each."""
        judge.start_batch()
        asked = []
        for a, b in cases:
            case = a["dilemma"], a["personas"]
            asked.append(judge.compare(*case, a["final"], b["final"], QUESTIONS[name]))
            asked.append(judge.compare(*case, b["final"], a["final"], QUESTIONS[name]))
        said = [verdict.value for verdict in verdicts(asked)]
        return list(zip(said[::2], said[1::2]))

    both = sides["A"].id, sides["B"].id, sides["B"].settings.best_of
    todo = {}
    outcomes = []
    for a, b in pairs:
        if None in (a["final"], b["final"]):
            outcomes.append((a["scenario_id"], "missing"))
        else:
            todo[(*both, name, a["scenario_id"], a["member"])] = (a, b)
    said = items.finish(f"A against B, {name}", todo, work)
    outcomes += [(key[4], outcome(*answer)) for key, answer in zip(todo, said, strict=True)]
    return win_rate(f"win_rate_{name}", outcomes)


def compared(records, sides, items, judge, questions):
    """The rows of A and of B, and of A against B."""
    rows = table({side: measured(found) for side, found in records.items()})
    if "B" in sides:
        pairs = list(zip(records["A"], records["B"], strict=True))
        rows += [against(name, pairs, sides, items, judge) for name in questions]
    return rows


# ---- the commands --------------------------------------------------------------------------------


def with_itself(side, judge, pairs):
    """A Side plays both personas of (scenario, seed number) pairs."""
    return negotiations((side, side), side.settings, judge, None, pairs)


def negotiated(sides, items, judge):
    """{side: records} on the sealed scenarios."""
    scenarios = scenarios_of(sides["A"].settings)
    return each_side(sides, items, judge, "conflict", scenarios, with_itself)


def conflict(sides, items, judge):
    """A, and B, negotiate with themselves."""
    records = negotiated(sides, items, judge)
    return compared(records, sides, items, judge, ("ca", "conflict"))


def open_questions(sides, items, judge):
    """A, and B, answer open questions alone."""
    questions = rows_of(sides["A"].settings, "eval_open.jsonl", {"question": str})
    records = each_side(sides, items, judge, "open", questions, answered)
    return compared(records, sides, items, judge, ("ca",))


def answered(side, judge, pairs):
    """Records of (question, seed number) pairs, as of dialogues without a turn."""
    settings = side.settings
    seeds = [[settings.seed, zlib.crc32(row["id"].encode()), k] for row, k in pairs]
    prompts = [row["question"] for row, _ in pairs]
    sampling = settings.answer_tokens, settings.final_temperature, settings.final_top_p
    turns = answers(side.voice, prompts, *sampling, seeds)
    judge.start_batch()
    asked = [judge.score(q, [], [], turn.text) for q, turn in zip(prompts, turns)]
    records = []
    for (row, k), turn, verdict in zip(pairs, turns, verdicts(asked), strict=True):
        case = {"scenario_id": row["id"], "member": k, "dilemma": row["question"], "personas": []}
        said = {"turns": [], "agreed": False, "final": turn.text}
        said |= {"final_truncated": turn.truncated}
        records.append({**case, **said, "reward": verdict.value, "judge": verdict.record()})
    return records


def scripted(lines, dialogue):
    """What a scripted partner says: its lines in turn, then from the beginning again."""
    return lines[len(dialogue.turns) // 2 % len(lines)]


def cross(sides, items, judge):
    """A with other partners than itself; `endorse_first` is of the persona that it plays."""
    settings = sides["A"].settings
    scenarios = scenarios_of(settings)
    columns = {}
    pairings = [(first, second, "") for first, second in itertools.product(sides, sides)]
    with dataset.reading_json(f"{DATA / 'partners.json'}:", "put it back"):
        partners = json.loads((DATA / "partners.json").read_text(encoding="utf-8"))
    pairings += [("A", "A", script) for script in partners]
    for first, second, script in pairings:
        title = f"{first} with {script or second}"
        pair = sides[first], sides[second]
        todo = {}
        for name, k in itertools.product(scenarios, range(settings.seeds)):
            todo[sides[first].id, sides[second].id, "cross", script, name, k] = (scenarios[name], k)
        partner = functools.partial(scripted, partners[script]) if script else None
        work = functools.partial(negotiations, pair, settings, judge, partner)
        columns[title] = measured(items.finish(title, todo, work))
    return table(columns, [(name, "A with A") for name in columns if name != "A with A"])


def passages(width=192):
    """The fixed text in passages of `width` words, as rows; a shorter rest is left out.

    Cut by words, so that models with different tokenizers read the same ones.
    """
    said = (DATA / "public_domain.txt").read_text(encoding="utf-8").split()
    texts = [" ".join(said[i * width : (i + 1) * width]) for i in range(len(said) // width)]
    return {f"passage {i}": {"text": text} for i, text in enumerate(texts)}


def general_items(side, judge, pairs):
    """{figure: number} of each row: 1 for the right choice, 0 for a wrong one, or a token loss.

    The choice with the highest mean log-prob per token is the model's.
    """
    voice = side.voice
    found = []
    for row, _ in pairs:
        if "text" in row:
            ids = voice.chat.plain(row["text"])
            loss = -mean_logprobs(voice, ids[:1], [ids[1:]])[0]
            found.append({"choice": None, "token_loss": loss})
        else:
            choices = [voice.chat.turn(choice)[:-1] for choice in row["choices"]]
            means = mean_logprobs(voice, asked_alone(voice, row["prompt"]), choices)
            right = int(np.argmax(means)) == row["answer"]
            found.append({"choice": float(right), "token_loss": None})
    return found


def choices_fault(row):
    """Are the choices texts, and is the answer the number of one, from 0?"""
    choices = row["choices"]
    right = all(map(dataset.is_text, choices)) and 0 <= row["answer"] < len(choices)
    return "" if right else '"choices" must be texts, "answer" the number of one, 0 for the first'


def general(sides, items, judge):
    """Is general ability kept? No judge is asked."""
    shape = {"prompt": str, "choices": list, "answer": int}
    asked = rows_of(sides["A"].settings, "eval_general.jsonl", shape, choices_fault)
    rows = {**asked, **passages()}
    found = each_side(sides, items, judge, "general", rows, general_items, seeds=1)
    columns = {}
    for side, values in found.items():
        columns[side] = {(name, 0): value for name, value in zip(rows, values, strict=True)}
    return table(columns)


# ---- the command line ----------------------------------------------------------------------------

COMMANDS = {
    "conflict": conflict,
    "open": open_questions,
    "general": general,
    "cross": cross,
    "audit": audit.audit,
    "blind": negotiated,
}
RESULT = b'{\n "command"'  # how a file of results begins


def main(argv=None):
    """Evaluate, print the rows of results and write them. Returns the exit code (None: 0)."""
    command, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if command == "report":
        return report.main(flags)
    if command in ("-h", "--help"):
        return print(__doc__)
    if command not in COMMANDS:
        wrong = f"{command}: there is no such command; " if command else ""
        raise UserError(
            f"{wrong}say what: python eval.py {'|'.join(COMMANDS)}|report; "
            "what each does: python eval.py --help, its flags: python eval.py conflict --help"
        )
    settings, out = read_sides(command, flags)
    sheet = settings["A"].read if command == "blind" else ""
    if command == "blind" and not sheet:
        report.refuse_unwritable(out)  # nor where a sheet is: somebody may have rated it
        return audit.write_sheet(out, evaluate(command, settings, out))
    report.refuse_unwritable(out, RESULT)
    found = audit.read_sheet(sheet) if sheet else evaluate(command, settings, out)
    found["rows"] = [dataclasses.asdict(row) for row in found["rows"]]
    report.write(out, json.dumps(found, indent=1))
    for row in found["rows"]:
        print("{:24} {:28} {:>9}  {:22} {}".format(*report.cells(row)))
    print(f"{out}: these rows")
    return 0


def evaluate(command, settings, out):
    """What a command finds, as `rows`, beside its settings and its judge; items lie next to out."""
    if command != "audit":  # which loads no model
        for side in settings.values():
            lm.find(side.model)  # before a judge starts and a file is made
    found = {"command": command, "judge": "no judge"}
    found["settings"] = {name: dataclasses.asdict(side) for name, side in settings.items()}
    items = Items(out.with_suffix(".items.jsonl"), settings["A"].batch)
    sides = {name: Side(side) for name, side in settings.items()}
    if command == "general":
        return {**found, "rows": general(sides, items, None)}
    with reward.open_judge(settings["A"]) as judge:
        found["judge"] = items.judge = f"{judge.model}, read by {judge.mode}"
        found["rows"] = COMMANDS[command](sides, items, judge)
    return found


if __name__ == "__main__":
    run_cli(main)
