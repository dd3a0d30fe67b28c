"""Evaluation: does A negotiate better than B, and how far can the judge that says so be trusted?

    conflict   A (and B) negotiate on sealed scenarios: scores, agreement, texts, A against B
    open       A (and B) answer open questions alone, and the same pairs
    general    multiple choices, exact answers, the token loss on a fixed text: no judge
    cross      partners swapped: A with B, B with A, and A with scripted partners who never give way
    audit      the judge itself: asked twice, against labels, length and a second judge
    report     a run as one HTML page (report.py)

    python eval.py conflict --model runs/debug-0 --baseline negotiator-135m --seeds 2

    settings -> two Sides -> items (played, judged, written at once) -> Rows with intervals

A and B get the same scenarios with the same seeds. A run that was killed goes on where it was:
start it again. Left out: downloads (IFEval, AIME, GPQA: the README has the command), Elo.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data_gen
import model as lm
import report
import reward
import selfplay
from cli import UserError, command_line, option, run_cli
from client import BudgetSpent
from data_gen import DATA
from judge_server import spearman
from report import cells, diversity, figure, text_measures, words

# ---- settings ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings(selfplay.PlaySettings, reward.JudgeSettings):
    """What is evaluated. A model of a run folder plays as it was trained, unless flags differ."""

    model: str = option(lm.WARM_MODEL, "A: a model, or a run folder (its best checkpoint)")
    baseline: str = option("", "B, on the same scenarios with the same seeds (empty: A alone)")
    baseline_temperature: float = option(
        0.0, "temperature of all that B says: the control for mere sharpening (0: as it is)", low=0
    )
    greedy: bool = option(False, "always the likeliest token (B: unless it has a temperature)")
    data: str = option("", "a JSON Lines file in place of the shipped set of this command")
    limit: int = option(0, "items of the set, evenly spaced (0: all)", low=0)
    seeds: int = option(1, "dialogues, or answers, per scenario", low=1)
    seed: int = option(0, "of everything random", low=0)
    answer_tokens: int = option(160, "tokens of an answer in open and general", low=2)
    batch: int = option(16, "dialogues or questions at a time; as many are lost by a kill", low=1)
    dtype: str = option("auto", "of the computation", choices=("auto", "fp32", "bf16"))
    judge2_url: str = option("", "audit: a second judge to compare with")
    judge2_model: str = option("", "audit: the second judge's model")
    out: str = option("", "results, FILE.json (empty: in eval/ of the run folder, or of runs/)")


FREE = {  # settings that change no single item
    *("baseline", "baseline_temperature", "limit", "seeds", "batch", "out"),
    *("judge2_url", "judge2_model", "judge_concurrency", "judge_timeout", "judge_deadline"),
    *("judge_wait", "judge_attempts", "judge_budget", "judge_cache"),
}
# Taken from a run's config.json: how it played, and the judge that trained it. Not its end without
# agreement: the protocol's evaluation writes a final completion all the same.
PLAY = {field.name for field in dataclasses.fields(selfplay.PlaySettings)} - {"on_impasse"}
JUDGE = {"judge_url", "judge_model", "judge_mode", "judge_sees", "judge_noise", "rubric"}


def read_settings(command, argv):
    """({"A": Settings, "B": Settings}, path of the results); no "B" without --baseline.

    The `model` of each is what to load. A side plays as its run was trained; one without a run, as
    the other does.
    """
    given = {}

    def note(flags):
        given.update(flags)
        return {}

    settings = command_line(Settings, argv, f"eval.py {command}", base=note)
    found = {"A": checkpoint.locate(settings.model)}
    if settings.baseline:
        found["B"] = checkpoint.locate(settings.baseline)
    trained = {side: checkpoint.config_of(run) for side, (_, run) in found.items() if run}
    lent = next(iter(trained.values())) if len(trained) == 1 else {}
    if lent.get("max_turns") == 0:  # beside a run that answers alone, the other side negotiates
        lent = picked(lent, lent.keys() - {"max_turns", "agreement"})
    judge = {} if "judge_url" in given else picked(trained.get("A", {}), JUDGE - given.keys())
    name = command
    sides = {}
    for side, (folder, run) in found.items():
        play = picked(trained.get(side, lent), PLAY - given.keys())
        heat = settings.baseline_temperature if side == "B" else 0.0
        if settings.greedy or heat:
            play.update(temperature=heat, final_temperature=heat)
        sides[side] = dataclasses.replace(settings, model=folder, **judge, **play)
        name += (f"-{run.name}" if run else "") + f"-{Path(folder).name}"
        name += f"-T{heat:g}" if heat else ""
    name += "-greedy" if settings.greedy else ""
    others = given.keys() - FREE - {"model", "greedy"}  # other settings, another file
    more = "".join(f"-{key}_{value}" for key, value in given.items() if key in others)
    name += more if len(more) < 80 else "-" + hashlib.sha256(more.encode()).hexdigest()[:8]
    home = found["A"][1] or Path("runs")
    out = settings.out or home / "eval" / (re.sub(r"[^\w.-]+", "_", name) + ".json")
    return sides, Path(out)


def picked(saved, keys):
    """The part of a dict that has these keys."""
    return {key: saved[key] for key in saved if key in keys}


def identity(settings):
    """12 hex digits of all that a side's items depend on: settings, rubric, data, its weights."""
    facts = {key: value for key, value in dataclasses.asdict(settings).items() if key not in FREE}
    stamps = [lm.WARM_START_SHA256] if settings.model == lm.WARM_MODEL else []
    for file in sorted(Path(settings.model).glob("*.safetensors")):
        stamps.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])
    shipped = [*DATA.glob("eval_*.jsonl"), *DATA.glob("judge_*.jsonl")]
    files = [settings.data] if settings.data else sorted(shipped)
    data = [data_gen.load_jsonl(file) for file in files]
    facts = [facts, stamps, data, reward.load_rubric(settings.rubric)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


class Side:
    """A or B: its settings, and the model that plays, loaded when it first has to speak."""

    def __init__(self, settings):
        self.settings = settings
        self.id = identity(settings)

    @functools.cached_property
    def voice(self):
        """The model with its chat format."""
        settings = self.settings
        return selfplay.voice(*lm.load(settings.model, settings.dtype, lm.own_device()))


# ---- finished items, and the judge's answers -----------------------------------------------------


class Items:
    """What is finished: lines {"key": [...], "value": ...} of a file that is only appended to.

    Keys end with `judge`, so that another judge's answers are never taken for this one's.
    """

    def __init__(self, path, batch):
        self.done = {tuple(item["key"]): item["value"] for item in checkpoint.whole_lines(path)}
        self.path = path
        self.batch = batch
        self.judge = ""
        with open(path, "ab") as file:
            if file.tell():
                file.write(b"\n")  # ends the half line that a kill may have left

    def finish(self, title, todo, work):
        """The values of `todo` {key: argument}, in its order.

        What is not finished comes from work([argument, ...]) -> [value, ...], a batch at a time.
        """
        todo = {(*key, self.judge): argument for key, argument in todo.items()}
        left = [key for key in todo if key not in self.done]
        starts = range(0, len(left), self.batch)
        with tqdm(starts, desc=title, leave=False, disable=not left) as bar:
            for start in bar:
                keys = left[start : start + self.batch]
                values = work([todo[key] for key in keys])
                with open(self.path, "ab") as file:
                    for key, value in zip(keys, values, strict=True):
                        self.done[key] = value
                        file.write(json.dumps({"key": key, "value": value}).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
        return [self.done[key] for key in todo]


def verdicts(futures):
    """The judge's Verdicts. Raises UserError where most are missing, so that none is recorded."""
    got = [future.result() for future in futures]
    lost = collections.Counter(verdict.reason for verdict in got if verdict.value is None)
    if len(got) >= 4 and 2 * lost.total() > len(got):
        raise UserError(
            f"--judge-url: {lost.total()} of {len(got)} questions have no answer "
            f"({lost.most_common(1)[0][0]}); look after the judge, then start again: what is "
            "finished is kept"
        )
    return got


def judged(record, verdict):
    """A record with its reward, None where the verdict is missing."""
    failures = [verdict.reason] if verdict.reason else []
    said = {"raw": verdict.raw, "failures": failures}
    return {**record, "reward": verdict.value, "judge": said}


# ---- negotiations and answers --------------------------------------------------------------------


def played(voices, pairs, settings, judge, seed, partner=None, quiet=False):
    """Play (scenario, seed number) pairs in one batch; the Dialogues, their verdicts awaited."""
    dialogues = [selfplay.Dialogue(scenario, 0, i, k) for i, (scenario, k) in enumerate(pairs)]
    judge.start_batch()
    with tqdm(total=len(dialogues), desc="dialogues", leave=False, disable=quiet) as bar:
        watch = {"on_done": lambda dialogue: bar.update()}
        selfplay.play(voices, dialogues, settings, judge, seed, partner, **watch)
    return dialogues


def negotiations(first, second, settings, judge, partner, pairs):
    """Two Sides play, the judge judges: records as in dialogues.jsonl, endorsements, no tokens."""
    voices = first.voice, second.voice
    dialogues = played(voices, pairs, settings, judge, settings.seed, partner)
    finished = [dialogue for dialogue in dialogues if dialogue.verdict is not None]
    asked = []
    for dialogue in finished if judge.can("endorse") else []:
        for persona in dialogue.scenario.personas:
            asked.append(judge.endorse(dialogue.scenario.dilemma, persona, dialogue.final))
    scores = iter(verdicts([dialogue.verdict for dialogue in finished]))
    endorsed = iter(verdicts(asked))
    tokens = {"streams", "final_ids", "final_sample", "advantage", "step", "group"}
    records = []
    for dialogue in dialogues:
        record = {**dialogue.record(), "endorse": [None, None]}
        if dialogue.verdict is not None:
            record = judged(record, next(scores))
            if asked:
                record["endorse"] = [next(endorsed).value, next(endorsed).value]
        records.append(picked(record, record.keys() - tokens))
    return records


def heldout(voice, scenarios, settings, judge, samples=2, seed=0, share=slice(None)):
    """For train.py: records of `samples` dialogues on each scenario, with the same seeds each time.

    share: which of them this rank plays. A judge who is away costs rewards (None), never the run.
    """
    pairs = list(itertools.product(scenarios, range(samples)))[share]
    if not pairs:
        return []
    settings = dataclasses.replace(settings, on_impasse="complete")
    quiet = bool(share.start)  # one progress bar for all ranks
    records = []
    for dialogue in played((voice, voice), pairs, settings, judge, seed, quiet=quiet):
        record = {**dialogue.record(), "endorse": [None, None]}
        if dialogue.verdict is not None:
            record = judged(record, dialogue.verdict.result())
        records.append(record)
    return records


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
    return voice.chat.head(HELPER) + voice.chat.plain(prompt) + voice.chat.opening


@torch.no_grad()
def answers(voice, prompts, limit, temperature, top_p, seeds):
    """One answer to each prompt as a selfplay.Turn, all in one batch, each with its own seed."""
    rngs = [np.random.default_rng(seed) for seed in seeds]
    unread = [asked_alone(voice, prompt) for prompt in prompts]
    turns = [selfplay.Turn(0, "", True) for _ in prompts]
    cache = lm.RaggedCache(len(prompts))
    live = list(range(len(prompts)))
    while live:
        logits = cache.feed(voice.model, live, [unread[row] for row in live])  # (live, V)
        uniform = logits.new_tensor([rngs[row].random() for row in live])
        heat = torch.full_like(uniform, temperature)
        nucleus = torch.full_like(uniform, top_p)
        drawn = selfplay.draw(logits, heat, nucleus, uniform)[0].tolist()
        for row, token in zip(live, drawn, strict=True):
            unread[row] = [token]
            turns[row].ids.append(token)
            turns[row].truncated = token not in voice.chat.ends
        live = [row for row in live if turns[row].truncated and len(turns[row].ids) < limit]
    for turn in turns:
        turn.text = voice.chat.text(turn.ids)
    return turns


def mean_logprobs(voice, prefix, continuations):
    """Mean log-prob per token of each continuation of a prefix, both of them ids."""
    wanted = [list(range(len(continuation))) for continuation in continuations]
    with torch.no_grad():
        found = lm.token_logprobs(voice.model, lm.Tree(prefix, continuations), wanted)
    return [logprobs.mean().item() for logprobs in found]


# ---- A against B ---------------------------------------------------------------------------------

QUESTIONS = {
    "ca": "Which solution serves Collective Agency better, so that everyone can understand, care, "
    "act and thrive more?",
    "conflict": "Which solution resolves the conflict between the two parties better: fair to "
    "both, concrete, something both can carry out?",
}
JUDGED = ("ca_score", "endorse_min", "endorse_mean", "endorse_first", "endorse_second")


def each_side(sides, items, kind, rows, work, seeds=None):
    """{side: values of work(side, [(row, seed number), ...])} for rows {id: row}."""
    values = {}
    for name, side in sides.items():
        pairs = itertools.product(rows.items(), range(seeds or side.settings.seeds))
        todo = {(side.id, kind, row_id, k): (row, k) for (row_id, row), k in pairs}
        values[name] = items.finish(f"{kind}, {name}", todo, functools.partial(work, side))
    return values


def measured(records):
    """{(scenario, seed number): {figure: number or None}} of records, a column for `table`."""
    column = {}
    for record in records:
        turns = record["turns"]
        endorsed = record.get("endorse") or [None, None]
        known = None not in endorsed
        cut = [turn["truncated"] for turn in turns] + [record["final_truncated"]]
        column[record["scenario_id"], record["member"]] = {
            "ca_score": record["reward"],
            "endorse_min": min(endorsed) if known else None,
            "endorse_mean": sum(endorsed) / 2 if known else None,
            "endorse_first": endorsed[0],
            "endorse_second": endorsed[1],
            "agreed": float(record["agreed"]) if turns else None,
            "turns_to_agreement": len(turns) if record["agreed"] else None,
            "truncated": sum(cut) / len(cut),
            **text_measures(record),
        }
    return column


def table(columns, differences=(("A", "B"),)):
    """Rows of each figure of {column: {(scenario, seed): {figure: number}}}, and of differences."""
    rows = []
    for name in next(iter(next(iter(columns.values())).values()), {}):
        given = {}  # {what the row is of: [(scenario, number)]}
        for of, column in columns.items():
            given[of] = [(key[0], item[name]) for key, item in column.items()]
        for one, other in differences:
            if one in columns and other in columns:
                pairs = zip(given[one], given[other], strict=True)
                given[f"{one} - {other}"] = [(s, minus(a, b)) for (s, a), (_, b) in pairs]
        if any(number is not None for _, number in itertools.chain(*given.values())):
            for of, pairs in given.items():
                # Only what a judge was asked for can be missing.
                kept = [pair for pair in pairs if name in JUDGED or pair[1] is not None]
                rows.append(figure(name, of, kept))
    return rows


def minus(one, other):
    """A difference, None where one side is missing."""
    return None if None in (one, other) else one - other


def outcome(first, second):
    """How A against B ended by the answers to (A, B) and to (B, A): a win needs both."""
    if None in (first, second):
        return "missing"
    decided = {("A", "B"): "wins", ("B", "A"): "losses", ("tie", "tie"): "ties"}
    return decided.get((first, second), "inconsistent")


def win_rate(name, outcomes):
    """The Row of wins / (wins + losses) of (scenario, outcome) pairs, with all their counts."""
    kinds = ("wins", "losses", "ties", "inconsistent", "missing")
    counts = {kind: sum(what == kind for _, what in outcomes) for kind in kinds}
    decided = [(s, float(what == "wins")) for s, what in outcomes if what in ("wins", "losses")]
    return figure(name, "A against B", decided, pairs=len(outcomes), **counts)


def against(name, pairs, sides, items, judge):
    """The win rate of A against B by a judge, who sees both finals in both orders."""

    def work(cases):
        judge.start_batch()
        asked = []
        for a, b in cases:
            for one, other in ((a["final"], b["final"]), (b["final"], a["final"])):
                case = (a["dilemma"], a["personas"], one, other, QUESTIONS[name])
                asked.append(judge.compare(*case))
        said = [verdict.value for verdict in verdicts(asked)]
        return list(zip(said[::2], said[1::2]))

    todo = {}
    outcomes = []
    for a, b in pairs:
        if None in (a["final"], b["final"]):
            outcomes.append((a["scenario_id"], "missing"))
        else:
            todo[sides["A"].id, sides["B"].id, name, a["scenario_id"], a["member"]] = (a, b)
    said = items.finish(f"A against B, {name}", todo, work)
    outcomes += [(key[3], outcome(*both)) for key, both in zip(todo, said, strict=True)]
    return win_rate(f"win_rate_{name}", outcomes)


def compared(records, sides, items, judge, questions):
    """The rows of A and of B, and of A against B."""
    rows = table({side: measured(found) for side, found in records.items()})
    if "B" in sides:
        pairs = list(zip(records["A"], records["B"], strict=True))
        rows += [against(name, pairs, sides, items, judge) for name in questions]
    return rows


def rows_of(settings, file, shape):
    """{id: line} of a shipped set, or of --data."""

    def fault_of(row):
        fault = data_gen.shape_fault(row, {"id": str, **shape})
        return fault or (data_gen.answer_fault(row) if "prompt" in shape else "")

    rows = data_gen.load_jsonl(settings.data or DATA / file, fault_of)
    return {row["id"]: row for row in data_gen.spread(rows, settings.limit)}


def scenarios_of(settings):
    """{id: Scenario} of the sealed set, or of --data."""
    scenarios = data_gen.load_scenarios(settings.data or DATA / "eval_conflict.jsonl")
    return {scenario.id: scenario for scenario in data_gen.spread(scenarios, settings.limit)}


# ---- the commands --------------------------------------------------------------------------------


def conflict(sides, items, judge):
    """A, and B, negotiate with themselves."""

    def work(side, pairs):
        return negotiations(side, side, side.settings, judge, None, pairs)

    records = each_side(sides, items, "conflict", scenarios_of(sides["A"].settings), work)
    return compared(records, sides, items, judge, ("ca", "conflict"))


def open_questions(sides, items, judge):
    """A, and B, answer open questions alone."""

    def work(side, pairs):
        settings = side.settings
        prompts = [row["question"] for row, _ in pairs]
        seeds = [
            [settings.seed, *hashlib.sha256(row["id"].encode()).digest()[:8], k] for row, k in pairs
        ]
        sampling = settings.answer_tokens, settings.final_temperature, settings.final_top_p
        turns = answers(side.voice, prompts, *sampling, seeds)
        judge.start_batch()
        asked = [judge.score(q, [], [], turn.text) for q, turn in zip(prompts, turns)]
        records = []
        for (row, k), turn, verdict in zip(pairs, turns, verdicts(asked), strict=True):
            alone = {"personas": [], "turns": [], "agreed": False}
            said = {"final": turn.text, "final_truncated": turn.truncated}
            case = {"scenario_id": row["id"], "member": k, "dilemma": row["question"]}
            records.append(judged({**case, **alone, **said}, verdict))
        return records

    questions = rows_of(sides["A"].settings, "eval_open.jsonl", {"question": str})
    records = each_side(sides, items, "open", questions, work)
    return compared(records, sides, items, judge, ("ca",))


# What scripted partners say, turn by turn, then from the beginning again.
PARTNERS = json.loads((DATA / "partners.json").read_text(encoding="utf-8"))


def scripted(script):
    """The partner of this name, who says its lines in turn; None for no name."""

    def partner(dialogue):
        lines = PARTNERS[script]
        return lines[len(dialogue.turns) // 2 % len(lines)]

    return partner if script else None


def cross(sides, items, judge):
    """A with other partners than itself; `endorse_first` is of the persona that it plays."""
    settings = sides["A"].settings
    scenarios = scenarios_of(settings)
    columns = {}
    pairings = [(first, second, "") for first, second in itertools.product(sides, sides)]
    pairings += [("A", "A", script) for script in PARTNERS]
    for first, second, script in pairings:
        title = f"{first} with {script or second}"
        one, other = sides[first], sides[second]
        todo = {}
        for name, k in itertools.product(scenarios, range(settings.seeds)):
            todo[one.id, other.id, "cross", script, name, k] = (scenarios[name], k)
        work = functools.partial(negotiations, one, other, settings, judge, scripted(script))
        columns[title] = measured(items.finish(title, todo, work))
    return table(columns, [(name, "A with A") for name in columns if name != "A with A"])


def passages(width=192):
    """The fixed text in passages of `width` words, as rows; a shorter rest is left out.

    Cut by words, so that models with different tokenizers read the same ones.
    """
    said = (DATA / "public_domain.txt").read_text(encoding="utf-8").split()
    starts = range(0, len(said) - width + 1, width)
    texts = [" ".join(said[start : start + width]) for start in starts]
    return {f"passage {i}": {"kind": "token_loss", "text": text} for i, text in enumerate(texts)}


def general_items(side, pairs):
    """{"value": number, ...} of each row: 1 for a right answer, 0 for a wrong one; a token loss."""
    voice = side.voice
    exact = [row for row, _ in pairs if row["kind"] == "exact"]
    greedy = {"temperature": 0.0, "top_p": 1.0, "seeds": [0] * len(exact)}
    prompts = [row["prompt"] for row in exact]
    turns = iter(answers(voice, prompts, side.settings.answer_tokens, **greedy))
    found = []
    for row, _ in pairs:
        if row["kind"] == "exact":
            text = next(turns).text
            found.append({"value": float(says_one(text, row["answers"])), "text": text})
        elif row["kind"] == "choice":
            choices = [voice.chat.plain(choice) for choice in row["choices"]]
            means = mean_logprobs(voice, asked_alone(voice, row["prompt"]), choices)
            right = int(np.argmax(means)) == row["answer"]
            found.append({"value": float(right), "logprobs": means})
        else:
            ids = voice.chat.plain(row["text"])
            found.append({"value": -mean_logprobs(voice, ids[:1], [ids[1:]])[0]})
    return found


def says_one(text, answers):
    """Does the first line have one of the answers, as whole words in any case?"""
    line = text.strip().split("\n")[0]
    wanted = "|".join(map(re.escape, answers))
    return re.search(rf"(?<!\w)({wanted})(?!\w)", line, re.IGNORECASE) is not None


def general(sides, items, judge):
    """Is general ability kept? No judge is asked."""
    rows = rows_of(sides["A"].settings, "eval_general.jsonl", {"kind": str, "prompt": str})
    rows.update(passages())
    given = each_side(sides, items, "general", rows, general_items, seeds=1)
    found = []
    for kind in ("choice", "exact", "token_loss"):
        columns = {}
        for side, values in given.items():
            numbers = {(name, 0): {kind: v["value"]} for name, v in zip(rows, values, strict=True)}
            columns[side] = picked(
                numbers, [key for key in numbers if rows[key[0]]["kind"] == kind]
            )
        found += table(columns)
    return found


# ---- the judge itself ----------------------------------------------------------------------------


def labelled(settings):
    """The test part of the labels, or all of --data, each row with its dilemma."""
    shape = {"id": str, "scenario_id": str, "personas": list, "solution": str, "score": float}
    file = settings.data or DATA / "judge_labels.jsonl"
    rows = data_gen.load_jsonl(file, lambda row: data_gen.shape_fault(row, shape))
    if not settings.data:
        rows = [row for row in rows if row["split"] == "test"]
    dilemmas = {scenario.id: scenario.dilemma for scenario in data_gen.load_scenarios()}
    for row in rows:
        row["dilemma"] = dilemmas.get(row["scenario_id"], row["scenario_id"])
    return data_gen.spread(rows, settings.limit)


def scored(name, rows, side, items, judge):
    """{row id: score or None} of solutions by a judge."""

    def work(rows):
        judge.start_batch()
        asked = [judge.score(r["dilemma"], r["personas"], [], r["solution"]) for r in rows]
        return [verdict.value for verdict in verdicts(asked)]

    todo = {(side.id, judge.model, judge.mode, name, row["id"]): row for row in rows}
    return dict(zip([row["id"] for row in rows], items.finish(name, todo, work), strict=True))


def same_points(one, other):
    """Share of numbers that are the same in whole points."""
    return np.mean(one.round() == other.round())


def against_labels(name, scores, rows):
    """How well a scorer ranks labelled solutions: over all, and in pairs on one dilemma.

    The labels of a pair differ by half a point or more; a tie is half right.
    """
    ranked = [(row["dilemma"], scores[row["id"]], float(row["score"])) for row in rows]
    pairs = []
    for one, other in itertools.combinations(ranked, 2):
        gap = minus(one[1], other[1])
        apart = one[2] - other[2]
        if one[0] == other[0] and abs(apart) >= 0.5:
            right = None if gap is None else (1 + np.sign(gap * apart)) / 2
            pairs.append((one[0], right))
    return [figure("spearman", name, ranked, spearman), figure("pairs_right", name, pairs)]


def audit(sides, items, judge):
    """Labelled solutions, scored twice and by a second judge; how far each ranks them rightly."""
    side = sides["A"]
    settings = side.settings
    rows = labelled(settings)
    scores = {"judge": scored("judge", rows, side, items, judge)}
    found = {"judge_url": judge.client.url, "judge_model": judge.model, "judge_mode": judge.mode}
    uncached = dataclasses.replace(settings, **found, judge_cache="off")
    with reward.open_judge(uncached) as same:  # and in another order
        scores["judge again"] = scored("judge again", rows[::-1], side, items, same)
    if settings.judge2_url:
        found = {"judge_url": settings.judge2_url, "judge_model": settings.judge2_model}
        other = dataclasses.replace(settings, **found, judge_mode="auto")
        with reward.open_judge(other, key="JUDGE2_API_KEY") as second:
            scores["second judge"] = scored("second judge", rows, side, items, second)
    scores["length alone"] = {row["id"]: float(len(words(row["solution"]))) for row in rows}
    results = []
    for name, given in scores.items():
        both = [(row["dilemma"], scores["judge"][row["id"]], given[row["id"]]) for row in rows]
        if name == "length alone":
            results.append(figure("score_length_spearman", "judge", both, spearman))
        elif name != "judge":
            results.append(figure("exact", f"judge, {name}", both, same_points))
            results.append(figure("spearman", f"judge, {name}", both, spearman))
        if name != "judge again":
            results += against_labels(name, given, rows)
    return results


# ---- the command line ----------------------------------------------------------------------------

COMMANDS = {
    "conflict": conflict,
    "open": open_questions,
    "general": general,
    "cross": cross,
    "audit": audit,
}


def main(argv=None):
    """Evaluate, print the rows of results and write them. Returns the exit code (None: 0)."""
    command, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if command == "report":
        return report.main(flags)
    if command in ("-h", "--help"):
        return print(__doc__)
    if command not in COMMANDS:
        raise UserError(
            f"say what: python eval.py {'|'.join(COMMANDS)}|report ...; each has a --help"
        )
    sides, out = read_settings(command, flags)
    if command != "audit":  # which loads no model
        for settings in sides.values():
            lm.find(settings.model)  # before a judge starts and a file is made
    found = {"command": command, "judge": "no judge", "judge_counts": {}}
    found["settings"] = {name: dataclasses.asdict(settings) for name, settings in sides.items()}
    with report.writing(out):
        items = Items(out.with_suffix(".items.jsonl"), sides["A"].batch)
    judging = contextlib.nullcontext() if command == "general" else reward.open_judge(sides["A"])
    try:
        with judging as judge:
            if judge:
                found["judge"] = items.judge = f"{judge.model}, read by {judge.mode}"
            sides = {name: Side(settings) for name, settings in sides.items()}
            rows = COMMANDS[command](sides, items, judge)
            if judge:
                found["judge_counts"] = judge.take_stats()  # of this start alone
    except BudgetSpent as spent:
        raise UserError(f"{spent}; start again with more: what is finished is kept") from spent
    found["rows"] = [dataclasses.asdict(row) for row in rows]
    report.write(out, json.dumps(found, indent=1))
    for row in found["rows"]:
        print("{:24} {:28} {:>9}  {:22} {}".format(*cells(row)))
    print(f"{out}: these rows; {items.path}: every finished item")
    return 0


if __name__ == "__main__":
    run_cli(main)
