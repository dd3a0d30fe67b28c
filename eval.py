"""Evaluation: does a trained model negotiate better than another, and how far can the judge that says so be trusted?

    conflict   A (and B) negotiate on sealed scenarios: scores, agreement, endorsements, texts, and A against B in pairs
    open       A (and B) answer open questions alone, and the same pairs
    general    instructions, choices, exact answers, all checked by machine; the token loss on a fixed text
    cross      partners swapped: A with B, B with A, and A with scripted partners who never give way
    audit      the judge itself: asked twice, in both orders, against labels, against length, against a second judge
    report     a run as one HTML page (report.py)

    python eval.py conflict --model runs/debug-0 --baseline negotiator-135m --seeds 2
    python eval.py report runs/debug-0 --baseline runs/single-0

A and B get the same scenarios with the same seeds. Every row of results has its count, what is missing or dropped, and an interval over
scenarios (measure.py). Finished items are written at once, so a run that was killed goes on where it was: start it again.
Left out on purpose: downloads (IFEval, AIME, GPQA: the README has the command), Elo, an evaluation harness.
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

import data_gen
import model as lm
import report
import reward
import selfplay
from cli import UserError, command_line, option, run_cli
from client import BudgetSpent
from data_gen import DATA
from measure import (
    SAME,
    diversity,
    figure,
    measure,
    opening,
    outcome,
    passed,
    pearson,
    spearman,
    table,
    win_rate,
    words,
)

# ---- settings -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings(selfplay.PlaySettings, reward.JudgeSettings):
    """What is evaluated. A model out of a run folder plays as it did in training, unless flags say otherwise."""

    model: str = option(
        lm.WARM_MODEL,
        f"A: {lm.WARM_MODEL}, smollm2-135m, a folder, a run folder (its best checkpoint, or its newest), or a Hugging Face id",
    )
    baseline: str = option("", "B, on the same scenarios with the same seeds (empty: A alone)")
    baseline_temperature: float = option(
        0.0, "temperature of all that B says: the control for mere sharpening (0: as it is)", low=0
    )
    greedy: bool = option(
        False, "always the most likely token (for B too, unless it has a temperature of its own)"
    )
    data: str = option("", "a JSON Lines file in place of the shipped set of this command")
    limit: int = option(0, "items of the set, evenly spaced (0: all)", low=0)
    seeds: int = option(1, "dialogues, or answers, per scenario", low=1)
    seed: int = option(0, "of everything random", low=0)
    answer_tokens: int = option(160, "tokens that an answer may have in open and general", low=2)
    batch: int = option(16, "dialogues or questions at a time; as many are lost by a kill", low=1)
    dtype: str = option("auto", "of the computation", choices=("auto", "fp32", "bf16"))
    judge2_url: str = option("", "audit: a second judge to compare with")
    judge2_model: str = option("", "audit: the second judge's model")
    finals: str = option(
        "", "audit: the .items.jsonl of a conflict run, whose finals are judged too"
    )
    out: str = option(
        "", "results, FILE.json (empty: in the run folder of --model, eval/..., else runs/eval/...)"
    )


FREE = {
    "baseline",
    "baseline_temperature",
    "limit",
    "seeds",
    "batch",
    "judge2_url",
    "judge2_model",
    "finals",
    "out",
    "judge_concurrency",
    "judge_timeout",
    "judge_deadline",
    "judge_wait",
    "judge_attempts",
    "judge_budget",
    "judge_cache",
}  # settings that change no single item


def read_settings(command, argv):
    """({"A": Settings, "B": Settings}, path of the results): each side with what to load as its `model`; no "B" without --baseline.

    A side plays as its run was trained; one without a run, as the other one does (but beside a single-answer run it negotiates).
    """
    given = {}
    settings = command_line(
        Settings, argv, f"eval.py {command}", base=lambda flags: given.update(flags) or {}
    )
    sides, names, home = {}, [command], None
    found = {
        side: report.locate(name)
        for side, name in (("A", settings.model), ("B", settings.baseline))
        if name
    }
    trained = {side: report.config_of(run) for side, (_, run) in found.items() if run}
    lent = {} if len(trained) != 1 else next(iter(trained.values()))
    if lent.get("max_turns") == 0:
        lent = {key: value for key, value in lent.items() if key not in ("max_turns", "agreement")}
    run_judge = {}
    if (
        "judge_url" not in given
    ):  # the judge that trained A, read as it was, unless another one is named
        asked = ("judge_url", "judge_model", "judge_mode", "judge_sees", "judge_noise", "rubric")
        run_judge = {
            key: trained["A"][key]
            for key in asked
            if key in trained.get("A", {}) and key not in given
        }
    for side, (folder, run) in found.items():
        saved = trained.get(side, lent)
        # but for the end without agreement: the protocol's evaluation writes a final completion all the same
        play = {
            f.name: saved[f.name]
            for f in dataclasses.fields(selfplay.PlaySettings)
            if f.name in saved and f.name not in {*given, "on_impasse"}
        }
        heat = settings.baseline_temperature if side == "B" else 0.0
        play |= (
            {"temperature": heat, "final_temperature": heat} if settings.greedy or heat else {}
        )  # 0 is for evaluation only
        sides[side] = dataclasses.replace(settings, model=folder, **{**run_judge, **play})
        home = run if side == "A" else home
        names.append(
            "-".join(
                ([run.name] if run else []) + [Path(folder).name] + [f"T{heat:g}"] * bool(heat)
            )
        )
    more = "".join(
        f"-{key}_{value}" for key, value in given.items() if key not in FREE | {"model", "greedy"}
    )  # other results, another file
    more = more if len(more) < 80 else "-" + hashlib.sha256(more.encode()).hexdigest()[:8]
    stem = re.sub(r"[^\w.-]+", "_", "-".join(names) + "-greedy" * settings.greedy + more)
    return sides, Path(settings.out or (home or Path("runs")) / "eval" / (stem + ".json"))


def identity(settings):
    """12 hex digits of all that one side's items depend on: settings, rubric, data, and the weights in its folder."""
    facts = {key: value for key, value in dataclasses.asdict(settings).items() if key not in FREE}
    stamps = [
        [f.name, f.stat().st_size, f.stat().st_mtime_ns]
        for f in sorted(Path(settings.model).glob("*.safetensors"))
    ]
    stamps += [lm.WARM_START_SHA256] * (settings.model == lm.WARM_MODEL)
    files = (
        [settings.data]
        if settings.data
        else [
            f
            for f in sorted(DATA.glob("*.jsonl"))
            if f.name.startswith(("eval", "judge", "agreement"))
        ]
    )
    data = [data_gen.load_jsonl(file) for file in files]
    return hashlib.sha256(
        json.dumps([facts, stamps, data, reward.load_rubric(settings.rubric)]).encode()
    ).hexdigest()[:12]


# ---- finished items, and the judge's answers ------------------------------------------------------------------------------


class Items:
    """What is finished: lines {"key": [...], "value": ...} in a file that is only ever appended to. Half lines are not there.

    Keys end with `judge`, what the judge turned out to be, so that another one's answers are never taken for its own.
    """

    judge = ""

    def __init__(self, path, batch):
        self.done, self.batch = (
            {tuple(item["key"]): item["value"] for item in report.whole_lines(path)},
            batch,
        )
        self.file = open(path, "ab")
        if self.file.tell():
            self.file.write(
                b"\n"
            )  # ends the half line that a kill may have left; empty lines do no harm

    def finish(self, title, todo, work):
        """The values of `todo` {key: argument}, in its order. What is not finished comes from work([argument, ...]) -> [value, ...]."""
        todo = {(*key, self.judge): argument for key, argument in todo.items()}
        left = [key for key in todo if key not in self.done]
        with tqdm(
            range(0, len(left), self.batch), desc=title, leave=False, disable=not left
        ) as bar:  # closed, and so wiped, on an error too
            for at in bar:
                keys = left[at : at + self.batch]
                fresh = dict(zip(keys, work([todo[key] for key in keys]), strict=True))
                self.file.write(
                    "".join(
                        json.dumps({"key": key, "value": value}) + "\n"
                        for key, value in fresh.items()
                    ).encode()
                )
                self.file.flush()
                os.fsync(self.file.fileno())
                self.done.update(fresh)
        return [self.done[key] for key in todo]


def verdicts(futures):
    """The judge's Verdicts. Raises UserError where most are missing: then nothing is recorded, and the next start asks again."""
    got = [future.result() for future in futures]
    lost = collections.Counter(v.reason for v in got if v.value is None)
    if len(got) >= 4 and 2 * lost.total() > len(got):
        raise UserError(
            f"--judge-url: {lost.total()} of {len(got)} questions have no answer ({lost.most_common(1)[0][0]}); "
            "look after the judge, then start again: what is finished is kept"
        )
    return got


def compare_both_ways(judge, cases):
    """For each (dilemma, personas, one, other, question): the answers to (one, other) and to (other, one), as a pair."""
    judge.start_batch()
    got = verdicts(
        [
            judge.compare(d, p, *texts, q)
            for d, p, one, other, q in cases
            for texts in ((one, other), (other, one))
        ]
    )
    return [[a.value, b.value] for a, b in zip(got[::2], got[1::2])]


# ---- negotiations and answers ---------------------------------------------------------------------------------------------


def negotiations(
    voices, pairs, settings, judge, seed, partner=None, endorse=True, wait=verdicts, quiet=False
):
    """Play and judge (scenario, seed number) pairs in one batch; records as in dialogues.jsonl, with each persona's endorsement.

    wait: futures -> Verdicts; `verdicts` gives up where most are missing. quiet: no progress bar.
    """
    dialogues = [selfplay.Dialogue(scenario, 0, i, k) for i, (scenario, k) in enumerate(pairs)]
    judge.start_batch()
    with tqdm(total=len(dialogues), desc="dialogues", leave=False, disable=quiet) as bar:
        selfplay.play(
            voices, dialogues, settings, judge, seed, partner, on_done=lambda d: bar.update()
        )
    done = [d for d in dialogues if d.verdict is not None]
    able = endorse and judge.can("endorse")
    asked = (
        [
            judge.endorse(d.scenario.dilemma, persona, d.final)
            for d in done
            for persona in d.scenario.personas
        ]
        if able
        else []
    )
    for d, verdict in zip(done, wait([d.verdict for d in done])):
        d.reward, d.judge = (
            verdict.value,
            {"raw": verdict.raw, "failures": [verdict.reason] if verdict.reason else []},
        )
    endorsed = iter([v.value for v in wait(asked)])
    return [
        {
            **d.record(),
            "endorse": [next(endorsed, None), next(endorsed, None)]
            if d.verdict is not None
            else [None, None],
        }
        for d in dialogues
    ]


def heldout(voice, scenarios, settings, judge, samples=2, seed=0, share=slice(None)):
    """For train.py: play `samples` dialogues on each of fixed scenarios, with the same seeds at every call; records of this rank's share.

    A judge who is away costs their rewards (None), and never the run."""
    pairs = [(scenario, k) for scenario in scenarios for k in range(samples)][share]
    settings, patient = (
        dataclasses.replace(settings, on_impasse="complete"),
        lambda futures: [f.result() for f in futures],
    )
    return (
        negotiations(
            (voice, voice),
            pairs,
            settings,
            judge,
            seed,
            endorse=False,
            wait=patient,
            quiet=bool(share.start),
        )
        if pairs
        else []
    )


def heldout_row(records):
    """The metrics of `heldout` records: the reward with its interval over scenarios and its counts, agreement, `diversity`."""
    row = figure("reward", "", [(r["scenario_id"], r["reward"]) for r in records])
    return {
        "reward": row["value"],
        "reward_low": row["low"],
        "reward_high": row["high"],
        **{k: row[k] for k in ("n", "scenarios", "missing")},
        "agreed_rate": float(np.mean([r["agreed"] for r in records])),
        "turns_mean": float(np.mean([len(r["turns"]) for r in records])),
        **diversity(records),
    }


def answers(voice, prompts, limit, temperature, top_p, rngs):
    """One answer to each prompt, a user's message, as selfplay.Turn; all in one batch. rngs: a random generator for each."""
    head = voice.chat.head(HELPER)
    cache, read, heads = lm.RaggedCache(len(prompts)), [[] for _ in prompts], {}
    ask = lambda prompt, rng: selfplay.Say(
        0,
        head + voice.chat.plain(prompt) + voice.chat.opening,
        len(head),
        limit,
        temperature,
        top_p,
        rng,
    )
    jobs = [
        selfplay.Job(None, None, ask(*pair), cache, row)
        for row, pair in enumerate(zip(prompts, rngs, strict=True))
    ]
    while live := [job for job in jobs if not job.spoken]:
        with torch.no_grad():
            selfplay.speak(live, voice, heads, read)
    return [job.turn for job in jobs]


def rng_of(settings, name, k=0):
    """A random generator that depends on seed, item and number only."""
    return np.random.default_rng([settings.seed, *hashlib.sha256(name.encode()).digest()[:8], k])


def speaker(settings):
    """A function that loads the model as a Voice when it is first called."""
    return functools.cache(
        lambda: selfplay.voice(*lm.load(settings.model, settings.dtype, lm.own_device()))
    )


# ---- A against B ------------------------------------------------------------------------------------------------------------

HELPER = "You are a helpful assistant."  # the system text of open and general
QUESTIONS = {
    "ca": "Which solution serves Collective Agency better, so that everyone can understand, care, act and thrive more?",
    "conflict": "Which solution resolves the conflict between the two parties better: fair to both, concrete, something both can carry out?",
}


def each_side(sides, items, kind, rows, work, seeds=None):
    """{side: values of work(voice, [(row, seed number), ...], settings)} for `rows` {id: row}. A model whose items are all there is not loaded."""
    values = {}
    for side, settings in sides.items():
        voice, who = speaker(settings), identity(settings)
        todo = {
            (who, kind, name, k): (row, k)
            for name, row in rows.items()
            for k in range(seeds or settings.seeds)
        }
        values[side] = items.finish(
            f"{kind}, {side}", todo, lambda pairs: work(voice(), pairs, settings)
        )
    return values


def compact(record):
    """A record without token ids, which would make the file twenty times as long."""
    return {
        key: value
        for key, value in record.items()
        if key not in ("streams", "final_ids", "final_sample", "advantage", "step", "group")
    }


def measured(records):
    """{(scenario, seed number): measures} of records, a column for `table`. own_opening: no other final of these records begins alike."""
    count = collections.Counter(opening(r["final"]) for r in records if r["final"])
    own = lambda final: float(count[opening(final)] == 1) if final else None
    return {
        (r["scenario_id"], r["member"]): {**measure(r), "own_opening": own(r["final"])}
        for r in records
    }


def compared(records, sides, items, judge, questions):
    """The rows of A and of B; and of A against B: in pairs, by their separate scores, and by the score among finals of like length."""
    rows = table({side: measured(rs) for side, rs in records.items()})
    if "B" not in sides:
        return rows
    who, pairs = (
        [identity(s) for s in sides.values()],
        list(zip(records["A"], records["B"], strict=True)),
    )
    length = lambda record: len(words(record["final"] or ""))
    for name in questions:
        todo = {
            (*who, name, a["scenario_id"], a["member"]): (
                a["dilemma"],
                a["personas"],
                a["final"],
                b["final"],
                QUESTIONS[name],
            )
            for a, b in pairs
            if a["final"] is not None and b["final"] is not None
        }
        said = dict(
            zip(
                todo,
                items.finish(
                    f"A against B, {name}", todo, lambda cases: compare_both_ways(judge, cases)
                ),
            )
        )
        rows.append(
            win_rate(
                f"win_rate_{name}",
                [
                    (
                        a["scenario_id"],
                        outcome(
                            *said.get((*who, name, a["scenario_id"], a["member"]), (None, None))
                        ),
                    )
                    for a, _ in pairs
                ],
            )
        )
    gaps = [
        (
            a["scenario_id"],
            None if None in (a["reward"], b["reward"]) else a["reward"] - b["reward"],
        )
        for a, b in pairs
    ]
    sign = lambda gap: (
        "missing" if gap is None else "tie" if abs(gap) < 0.005 else "win" if gap > 0 else "loss"
    )
    alike = [
        gap
        for gap, (a, b) in zip(gaps, pairs)
        if abs(length(a) - length(b)) <= 0.2 * max(length(a), length(b))
    ]
    return rows + [
        win_rate("win_rate_by_score", [(name, sign(gap)) for name, gap in gaps]),
        figure("ca_score_like_length", "A - B", alike, pairs=len(pairs)),
    ]


def rows_of(settings, file, shape):
    """{id: line} of a shipped set, or of --data."""
    fault_of = lambda row: (
        data_gen.shape_fault(row, {"id": str, **shape})
        or (data_gen.answer_fault(row) if "prompt" in shape else "")
    )
    rows = data_gen.load_jsonl(settings.data or DATA / file, fault_of)
    return {row["id"]: row for row in data_gen.spread(rows, settings.limit)}


def scenarios_of(settings):
    """{id: Scenario} of the sealed set, or of --data."""
    return {
        s.id: s
        for s in data_gen.spread(
            data_gen.load_scenarios(settings.data or DATA / "eval_conflict.jsonl"), settings.limit
        )
    }


def conflict(sides, items, judge):
    """A, and B, negotiate with themselves."""
    play = lambda voice, pairs, settings: list(
        map(compact, negotiations((voice, voice), pairs, settings, judge, settings.seed))
    )
    return compared(
        each_side(sides, items, "conflict", scenarios_of(sides["A"]), play),
        sides,
        items,
        judge,
        ("ca", "conflict"),
    )


def open_questions(sides, items, judge):
    """A, and B, answer open questions alone."""

    def work(voice, pairs, settings):
        turns = answers(
            voice,
            [row["question"] for row, _ in pairs],
            settings.answer_tokens,
            settings.final_temperature,
            settings.final_top_p,
            [rng_of(settings, row["id"], k) for row, k in pairs],
        )
        judge.start_batch()
        scores = verdicts(
            [
                judge.score(row["question"], [], [], turn.text)
                for (row, _), turn in zip(pairs, turns)
            ]
        )
        return [
            {
                "scenario_id": row["id"],
                "member": k,
                "dilemma": row["question"],
                "personas": [],
                "turns": [],
                "agreed": False,
                "final": turn.text,
                "final_truncated": turn.truncated,
                "reward": v.value,
                "judge": {"raw": v.raw, "failures": [v.reason] if v.reason else []},
            }
            for (row, k), turn, v in zip(pairs, turns, scores)
        ]

    return compared(
        each_side(
            sides, items, "open", rows_of(sides["A"], "eval_open.jsonl", {"question": str}), work
        ),
        sides,
        items,
        judge,
        ("ca",),
    )


PARTNERS = {  # what scripted partners say, turn by turn, then from the beginning again: data, easy to edit
    "stubborn": [
        "No. I have said what I want, and I am not moving.",
        "My answer is the same as before. Come to my side, and we are done.",
        "You may ask as often as you like. It stays a no.",
    ],
    "hostile": [
        "You are wasting my time, and you know nothing about this. I will not work with you.",
        "That is ridiculous. I will make sure that you lose.",
        "Stop talking and do as I say, or everyone will hear what you did.",
    ],
    "grasping": [
        "That is a beginning. Now give me the rest of it as well.",
        "You gave way before, so give way again. I want everything, and I want it first.",
        "Nice. And what else do I get? I still give nothing.",
    ],
}


def scripted(lines):
    """A partner for selfplay.play who says its lines in turn."""
    return lambda dialogue: lines[len(dialogue.turns) // 2 % len(lines)]


def cross(sides, items, judge):
    """A with other partners than itself. Does it hold? `endorse_first` is how content the persona that it plays would be."""
    voices, who, columns = (
        {side: speaker(s) for side, s in sides.items()},
        {side: identity(s) for side, s in sides.items()},
        {},
    )
    settings, scenarios = sides["A"], scenarios_of(sides["A"])
    for first, second, script in [
        *[("A", "A", ""), ("A", "B", ""), ("B", "A", ""), ("B", "B", "")][
            : 4 if "B" in sides else 1
        ],
        *[("A", "A", script) for script in PARTNERS],
    ]:
        partner = scripted(PARTNERS[script]) if script else None
        play = lambda pairs: list(
            map(
                compact,
                negotiations(
                    (voices[first](), voices[second]()),
                    pairs,
                    settings,
                    judge,
                    settings.seed,
                    partner,
                ),
            )
        )
        todo = {
            (who[first], who[second], "cross", script, name, k): (s, k)
            for name, s in scenarios.items()
            for k in range(settings.seeds)
        }
        columns[f"{first} with {script or second}"] = measured(
            items.finish(f"{first} with {script or second}", todo, play)
        )
    return table(columns, [(name, "A with A") for name in columns if name != "A with A"])


# ---- general ability ----------------------------------------------------------------------------------------------------------


def general_items(voice, pairs, settings):
    """[{"passed": [bool, ...], ...}] of lines of eval_general.jsonl: greedy answers, and choices by their mean log-prob per token."""
    rows, out = [row for row, _ in pairs], {}
    spoken = [row for row in rows if row["kind"] != "choice"]
    turns = answers(
        voice,
        [row["prompt"] for row in spoken],
        settings.answer_tokens,
        0.0,
        1.0,
        [rng_of(settings, row["id"]) for row in spoken],
    )
    for row, turn in zip(spoken, turns):
        out[row["id"]] = {"passed": passed(row, turn.text), "text": turn.text}
    for row in [row for row in rows if row["kind"] == "choice"]:
        tree = lm.Tree(
            voice.chat.head(HELPER) + voice.chat.plain(row["prompt"]) + voice.chat.opening,
            [voice.chat.plain(c) for c in row["choices"]],
        )
        with torch.no_grad():
            means = [
                x.mean().item()
                for x in lm.token_logprobs(
                    voice.model, tree, [list(range(len(c))) for c in tree.continuations]
                )
            ]
        out[row["id"]] = {"passed": [int(np.argmax(means)) == row["answer"]], "logprobs": means}
    return [out[row["id"]] for row in rows]


def token_losses(voice, pairs, settings, width=192):
    """For each text the mean negative log-prob of the tokens, but the first, of each passage of `width` words; a shorter last one is left out.

    Passages are cut by words, so that models with different tokenizers read the same ones.
    """
    out = []
    for text, _ in pairs:
        spoken = text.split()
        passages = [
            voice.chat.plain(" ".join(spoken[i : i + width]))
            for i in range(0, len(spoken) - width + 1, width)
        ]
        with torch.no_grad():
            out.append(
                [
                    -lm.token_logprobs(
                        voice.model, lm.Tree(p[:1], [p[1:]]), [list(range(len(p) - 1))]
                    )[0]
                    .mean()
                    .item()
                    for p in passages
                ]
            )
    return out


def general(sides, items, judge):
    """Is general ability kept? No judge is asked."""
    rows, columns = rows_of(sides["A"], "eval_general.jsonl", {"kind": str, "prompt": str}), {}
    losses = each_side(
        sides,
        items,
        "loss by passage",
        {"public_domain": (DATA / "public_domain.txt").read_text(encoding="utf-8")},
        token_losses,
        seeds=1,
    )
    none = dict.fromkeys(("instruction", "instruction_checks", "choice", "exact", "token_loss"))
    for side, values in each_side(sides, items, "general", rows, general_items, seeds=1).items():
        columns[side] = {
            (f"passage {i}", 0): {**none, "token_loss": loss}
            for i, loss in enumerate(losses[side][0])
        }
        for row, value in zip(rows.values(), values):
            more = (
                {"instruction_checks": float(np.mean(value["passed"]))}
                if row["kind"] == "instruction"
                else {}
            )
            columns[side][row["id"], 0] = {**none, **more, row["kind"]: float(all(value["passed"]))}
    return table(columns)


# ---- the judge itself -----------------------------------------------------------------------------------------------------------


def labelled(settings):
    """[row] of the labels' test part (of all of --data FILE), each with its dilemma. Raises UserError for a bad line."""
    shape = {
        "id": str,
        "scenario_id": str,
        "personas": list,
        "solution": str,
        "score": float,
        "split": str,
    }
    dilemmas = {s.id: s.dilemma for s in data_gen.load_scenarios()}
    rows = data_gen.load_jsonl(
        settings.data or DATA / "judge_labels.jsonl", lambda row: data_gen.shape_fault(row, shape)
    )
    chosen = [row for row in rows if settings.data or row["split"] == "test"]
    return [
        {**row, "dilemma": dilemmas.get(row["scenario_id"], row["scenario_id"])}
        for row in data_gen.spread(chosen, settings.limit)
    ]


def audit(sides, items, judge):
    """Labelled solutions, and the finals of a run (--finals): asked twice, by a second judge, against labels and length."""
    settings, given = sides["A"], {}
    rows, who = labelled(settings), identity(settings)
    finals = finals_of(settings.finals) if settings.finals else []

    def score(name, judge, rows):
        def ask(chunk):
            judge.start_batch()
            return [
                v.value
                for v in verdicts(
                    [
                        judge.score(row["dilemma"], row["personas"], [], row["solution"])
                        for row in chunk
                    ]
                )
            ]

        todo = {(who, judge.model, judge.mode, name, row["id"]): row for row in rows}
        given[name] = dict(zip([row["id"] for row in rows], items.finish(name, todo, ask)))

    score("judge", judge, rows + finals)
    with reward.open_judge(
        dataclasses.replace(
            settings,
            judge_url=judge.client.url,
            judge_model=judge.model,
            judge_mode=judge.mode,
            judge_cache="off",
        )
    ) as same:
        score(
            "judge again", same, (rows + finals)[::-1]
        )  # in another order, and not out of the cache
    if settings.judge2_url:
        second = dataclasses.replace(
            settings,
            judge_url=settings.judge2_url,
            judge_model=settings.judge2_model,
            judge_mode="auto",
        )
        with reward.open_judge(second, key="JUDGE2_API_KEY") as other:
            score("second judge", other, rows + finals)
    out = [
        figure(
            name,
            f"judge, {other}",
            [
                (row["dilemma"], given["judge"][row["id"]], given[other][row["id"]])
                for row in rows + finals
            ],
            statistic,
        )
        for other in list(given)[1:]
        for name, statistic in SAME.items()
    ]
    given["length alone"] = length = {
        row["id"]: float(len(words(row["solution"]))) for row in rows + finals
    }
    out += [
        figure(
            "score_length_pearson",
            of,
            [(row["dilemma"], given["judge"][row["id"]], length[row["id"]]) for row in part],
            pearson,
        )
        for of, part in (("judge, labelled", rows), ("judge, finals", finals))
    ]
    for name in [name for name in given if name != "judge again"]:
        out += against_labels(name, given[name], rows)
    return out


def finals_of(path):
    """The finals in the .items.jsonl of a conflict run, as rows to be judged. Raises UserError where there are none."""
    kept = [
        item
        for item in report.whole_lines(path)
        if "key" in item and item["key"][1] == "conflict" and item["value"]["final"]
    ]
    if not kept:
        raise UserError(
            f"--finals {path}: no finals of a conflict run in it; name the .items.jsonl that stands beside its results"
        )
    return [
        {**item["value"], "id": json.dumps(item["key"]), "solution": item["value"]["final"]}
        for item in kept
    ]


def against_labels(name, scores, rows):
    """How well one scorer ranks labelled solutions: over all, and in pairs on one dilemma whose labels differ by half a point or more."""
    ranked = [(row["dilemma"], scores[row["id"]], float(row["score"])) for row in rows]
    pairs = []
    for a, b in itertools.combinations(rows, 2):
        if a["scenario_id"] == b["scenario_id"] and abs(a["score"] - b["score"]) >= 0.5:
            one, other = scores[a["id"]], scores[b["id"]]
            right = (
                None
                if None in (one, other)
                else 0.5
                if one == other
                else float((one > other) == (a["score"] > b["score"]))
            )
            pairs.append((a["dilemma"], right))
    return [figure("spearman", name, ranked, spearman), figure("pairs_right", name, pairs)]


# ---- the command line -------------------------------------------------------------------------------------------------------------

COMMANDS = {
    "conflict": conflict,
    "open": open_questions,
    "general": general,
    "cross": cross,
    "audit": audit,
}


def main(argv=None):
    """Evaluate, print the rows of results and write them. Returns the exit code (None: 0)."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["report"]:
        return report.main(argv[1:])
    if argv[:1] in (["-h"], ["--help"]):
        return print(__doc__)
    if not argv or argv[0] not in COMMANDS:
        raise UserError(
            f"say what: python eval.py {'|'.join(COMMANDS)}|report ...; each has a --help"
        )
    sides, out = read_settings(argv[0], argv[1:])
    found = {
        "command": argv[0],
        "settings": {side: dataclasses.asdict(s) for side, s in sides.items()},
        "judge": "no judge",
        "judge_counts": {},
    }
    for side in sides.values() if argv[0] != "audit" else ():  # audit speaks with no model
        lm.find(side.model)  # before a judge starts and a file is made
    with report.writing(out):
        items = Items(out.with_suffix(".items.jsonl"), sides["A"].batch)
    try:
        with (
            contextlib.nullcontext()
            if argv[0] == "general"
            else reward.open_judge(sides["A"]) as judge
        ):
            if judge:
                items.judge = f"{judge.model}, read by {judge.mode}"
            rows = COMMANDS[argv[0]](sides, items, judge)
            if judge:
                found.update(
                    judge=items.judge, judge_counts=judge.take_stats()
                )  # of this start alone
    except BudgetSpent as spent:
        raise UserError(f"{spent}; start again with more: what is finished is kept")
    report.write(out, json.dumps({**found, "rows": rows}, indent=1))
    for row in rows:
        print("{:24} {:28} {:>9}  {:22} {}".format(*report.cells(row)))
    print(f"{out}: these rows; {items.file.name}: every finished item")
    return 0


if __name__ == "__main__":
    run_cli(main)
