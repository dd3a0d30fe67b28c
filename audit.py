"""How far can those who rate be trusted, and what do people say who do not know the sides?

    audit    the judge scores labelled solutions twice, and a second judge once: does it agree with
             itself, with the labels, with the other one, and is it length alone?
    blind    records of A and B -> FILE, a shuffled sheet without sides, and FILE.key, which has
             them -> a "score" filled in on each line -> rows with intervals

Both are commands of eval.py, which calls this file:

    python eval.py blind --model runs/debug-0 --baseline negotiator-135m --out sheet.jsonl
    python eval.py blind --read sheet.jsonl
"""

import collections
import dataclasses
import json
from pathlib import Path

import numpy as np

import dataset
import report
import reward
from cli import UserError
from dataset import DATA
from measure import figure, minus, pairs_right, spearman, words
from sides import load_rows, verdicts

# ---- the judge itself ----------------------------------------------------------------------------


def score_fault(row):
    """Is the score, where there is one, a number from 0 to 5?"""
    score = row.get("score")
    if score is None or (type(score) in (int, float) and 0 <= score <= 5):
        return ""
    return f'"score" is no number from 0 to 5: {json.dumps(score)[:40]}; correct it'


def labelled(settings):
    """The test part of the labels, or all of --data, each row with its dilemma."""
    shape = {"scenario_id": str, "personas": list, "solution": str, "score": float}
    rows = load_rows(settings.data or DATA / "judge_labels.jsonl", shape, score_fault)
    if not settings.data:
        rows = [row for row in rows if row["split"] == "test"]
    dilemmas = {scenario.id: scenario.dilemma for scenario in dataset.load_scenarios()}
    for row in rows:
        row["dilemma"] = dilemmas.get(row["scenario_id"], row["scenario_id"])
    return dataset.spread(rows, settings.limit)


def scored(name, rows, side, items, judge):
    """{row id: score or None} of solutions by a judge."""

    def work(rows):
        judge.start_batch()
        asked = [judge.score(r["dilemma"], r["personas"], [], r["solution"]) for r in rows]
        return [verdict.value for verdict in verdicts(asked)]

    todo = {(side.id, judge.model, judge.mode, name, row["id"]): row for row in rows}
    return dict(zip([row["id"] for row in rows], items.finish(name, todo, work), strict=True))


def against_labels(name, scores, rows):
    """How well a scorer ranks labelled solutions: over all, and in pairs on one dilemma."""
    ranked = [(row["dilemma"], scores[row["id"]], float(row["score"])) for row in rows]
    pairs = pairs_right(ranked)
    return [figure("spearman", name, ranked, spearman), figure("pairs_right", name, pairs)]


def audit(sides, items, judge):
    """Labelled solutions, scored twice and by a second judge; how far each ranks them rightly."""
    side = sides["A"]
    settings = side.settings
    rows = labelled(settings)
    scores = {"judge": scored("judge", rows, side, items, judge)}
    found = {"judge_url": judge.client.url, "judge_model": judge.model, "judge_mode": judge.mode}
    with reward.open_judge(dataclasses.replace(settings, **found)) as same:  # in another order
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
            results.append(figure("spearman", f"judge, {name}", both, spearman))
        if name != "judge again":
            results += against_labels(name, given, rows)
    return results


# ---- people, who do not know the sides -----------------------------------------------------------


def write_sheet(path, found):
    """Write the finals of `found`, shuffled, as JSON Lines, and who said what into FILE.key.

    Returns the exit code. found: `rows` is {side: records}, `settings` is {side: dict}.
    """
    said = []
    for side, records in found["rows"].items():
        said += [(side, record) for record in records]
    order = np.random.default_rng(found["settings"]["A"]["seed"]).permutation(len(said))
    lines = []
    key = []
    for number, i in enumerate(order.tolist()):
        side, record = said[i]
        case = {"dilemma": record["dilemma"], "personas": record["personas"]}
        of = {"side": side, "scenario": record["scenario_id"], "member": record["member"]}
        key.append({"id": str(number), **of})
        if record["final"] is not None:  # else its score is missing
            lines.append({"id": str(number), **case, "solution": record["final"], "score": None})
    about = {"settings": found["settings"], "items": key}
    report.write(Path(f"{path}.key"), json.dumps(about, indent=1))
    report.write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    print(f'{path}: fill in each "score", 0 to 5, then: python eval.py blind --read {path}')
    return 0


def read_sheet(path):
    """The results of a sheet whose scores are filled in, with FILE.key beside it.

    A line without a score, and one that was taken out, counts as missing.
    """
    scores = {row["id"]: row.get("score") for row in load_rows(path, {}, score_fault)}
    given = collections.defaultdict(dict)  # {(scenario, member): {side: score}}
    with dataset.reading_json(f"{path}.key:", "lay it beside the sheet again"):
        about = json.loads(Path(f"{path}.key").read_text(encoding="utf-8"))
        settings = dict(about["settings"])
        for item in about["items"]:
            pair = given[item["scenario"], item["member"]]
            pair[item["side"]] = scores.pop(item["id"], None)
    if scores:
        raise UserError(
            f'{path}: id "{next(iter(scores))}" is not in {path}.key; lay the right key beside it'
        )
    rows = []
    for side in settings:
        rated = [(scenario, pair.get(side)) for (scenario, _), pair in given.items()]
        rows.append(figure("rating", side, rated))
    if len(rows) == 2:
        gaps = [(s, minus(pair.get("A"), pair.get("B"))) for (s, _), pair in given.items()]
        rows.append(figure("rating", "A - B", gaps))
    judge = f"people, {Path(path).name}"
    return {"command": "blind", "judge": judge, "settings": settings, "rows": rows}
