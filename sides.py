"""Who is compared: the two sides of an evaluation, and what of it is finished already.

flags, a run's config.json -> EvalSettings of A and of B -> Sides, whose models load when they speak
todo {key: argument} -> Items.finish -> values, each written to the file at once
"""

import collections
import dataclasses
import functools
import hashlib
import json
import re
from pathlib import Path

from tqdm import tqdm

import chat
import checkpoint
import dataset
import model as lm
import report
import reward
import rubric
import selfplay
from cli import UserError, command_line, option
from dataset import DATA

# ---- settings ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EvalSettings(selfplay.PlaySettings, reward.JudgeSettings):
    """What is evaluated. A model of a run folder plays as it was trained, unless flags differ."""

    model: str = option(lm.WARM_MODEL, "A: a model, or a run folder (its best checkpoint)")
    baseline: str = option("", "B, on the same scenarios with the same seeds (empty: A alone)")
    baseline_temperature: float = option(
        0.0, "temperature of all that B says: the control for mere sharpening (0: as it is)", low=0
    )
    best_of: int = option(1, "conflict, open, blind: B's best of so many, by this judge", low=1)
    data: str = option("", "a JSON Lines file in place of the shipped set of this command")
    limit: int = option(0, "items of the set, evenly spaced (0: all)", low=0)
    seeds: int = option(1, "dialogues, or answers, per scenario", low=1)
    seed: int = option(0, "of everything random", low=0)
    answer_tokens: int = option(160, "tokens of an answer in open", low=2)
    batch: int = option(16, "dialogues or questions at a time; as many are lost by a kill", low=1)
    dtype: str = option("auto", "of the computation", choices=("auto", "fp32", "bf16"))
    judge2_url: str = option("", "audit: a second judge to compare with")
    judge2_model: str = option("", "audit: the second judge's model")
    read: str = option("", "a sheet of blind with its ratings filled in; nothing is played")
    out: str = option("", "results, FILE.json (empty: in eval/ of the run folder, or of runs/)")


BASELINE = {"baseline", "baseline_temperature", "best_of"}  # settings that change nothing of A
FREE = {  # settings that change no single item
    *("limit", "seeds", "batch", "read", "out", "judge2_url", "judge2_model"),
    *("judge_concurrency", "judge_timeout", "judge_deadline", "judge_wait", "judge_attempts"),
    "judge_budget",
    "date",  # a command that goes on the next day goes on where it was
}
# Taken from a run's config.json: how it played, and the judge that trained it. Not its end without
# agreement: the protocol's evaluation writes a joint solution all the same.
PLAY = {field.name for field in dataclasses.fields(selfplay.PlaySettings)} - {"on_impasse"}
JUDGE = {"judge_url", "judge_model", "judge_mode", "judge_sees", "judge_noise", "rubric"}


def read_sides(command, argv):
    """({"A": EvalSettings, "B": EvalSettings}, path of the results); no "B" without --baseline.

    The `model` of each is what to load. A side plays as its run was trained; one without a run, as
    the other does.
    """
    given = {}

    def note(flags):
        given.update(flags)
        return {}

    settings = command_line(EvalSettings, argv, f"eval.py {command}", base=note)
    compares = settings.baseline and command in ("conflict", "open", "blind")
    if settings.best_of > 1 and not compares:
        raise UserError("--best-of: of a --baseline, in conflict, open or blind; leave it out")
    found = {"A": checkpoint.locate(settings.model)}
    if settings.baseline:
        found["B"] = checkpoint.locate(settings.baseline)
    trained = {side: checkpoint.config_of(run) for side, (_, run) in found.items() if run}
    lent = next(iter(trained.values())) if len(trained) == 1 else {}
    if lent.get("max_turns") == 0:  # beside a run that answers alone, the other side negotiates
        lent = picked(lent, lent.keys() - {"max_turns", "agreement"})
    judge = {} if "judge_url" in given else picked(trained.get("A", {}), JUDGE - given.keys())
    sides = {}
    for side, (folder, _) in found.items():
        play = picked(trained.get(side, lent), PLAY - given.keys())
        sides[side] = dataclasses.replace(settings, model=folder, best_of=1, **judge, **play)
    if settings.baseline:
        sides["B"] = dataclasses.replace(sides["B"], best_of=settings.best_of)
    heat = settings.baseline_temperature
    if settings.baseline and heat:
        sides["B"] = dataclasses.replace(sides["B"], temperature=heat, final_temperature=heat)
    return sides, results_path(command, settings, found, given)


def load_rows(path, shape, fault_of=lambda row: ""):
    """The lines of a JSON Lines file, each of this shape and with an id of its own."""
    shape = {"id": str, **shape}
    return dataset.load_jsonl(path, lambda row: dataset.shape_fault(row, shape) or fault_of(row))


def rows_of(settings, file, shape, fault_of=lambda row: ""):
    """{id: line} of a shipped set, or of --data."""
    rows = load_rows(settings.data or DATA / file, shape, fault_of)
    return {row["id"]: row for row in dataset.spread(rows, settings.limit)}


def scenarios_of(settings):
    """{id: Scenario} of the sealed set, or of --data."""
    scenarios = dataset.load_scenarios(settings.data or DATA / "eval_conflict.jsonl")
    return {scenario.id: scenario for scenario in dataset.spread(scenarios, settings.limit)}


def results_path(command, settings, found, given):
    """--out, or a file named after what is read or compared: other flags, other file.

    found: {side: what `locate` says}. given: {setting: value} of the flags.
    """
    sheet = settings.read if command == "blind" else ""
    if settings.out or sheet:
        return Path(settings.out or f"{sheet}.json")
    name = command
    for folder, run in found.values():
        name += (f"-{run.name}" if run else "") + f"-{Path(folder).name}"
    others = given.keys() - FREE - {"model", "baseline"}
    more = "".join(f"-{key}_{value}" for key, value in given.items() if key in others)
    name += more if len(more) < 80 else "-" + hashlib.sha256(more.encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "_", name) + (".jsonl" if command == "blind" else ".json")
    return (found["A"][1] or Path("runs")) / "eval" / name


def picked(saved, keys):
    """The part of a dict that has these keys."""
    return {key: saved[key] for key in saved if key in keys}


def identity(settings):
    """12 hex digits of all that a side's items depend on: settings, rubric, data, its weights."""
    facts = dataclasses.asdict(settings)
    facts = picked(facts, facts.keys() - FREE - BASELINE)
    stamps = [lm.WARM_START_SHA256] if settings.model == lm.WARM_MODEL else []
    for file in sorted(Path(settings.model).glob("*.safetensors")):
        stamps.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])
    shipped = [*DATA.glob("eval_*.jsonl"), *DATA.glob("judge_*.jsonl")]
    files = [settings.data] if settings.data else sorted(shipped)
    data = [dataset.load_jsonl(file) for file in files]
    facts = [facts, stamps, data, rubric.load_rubric(settings.rubric)]
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
        return chat.Voice(*lm.load(settings.model, settings.dtype, lm.own_device()), settings.date)


# ---- finished items, and the judge's answers -----------------------------------------------------


class Items:
    """What is finished: lines {"key": [...], "value": ...} of a file that is only appended to.

    Keys end with `judge`, so that another judge's answers are never taken for this one's.
    """

    def __init__(self, path, batch):
        report.refuse_unwritable(path, b'{"key"')
        with dataset.reading_json(f"{path}: a line", "take it out"):
            lines = checkpoint.whole_lines(path)
            self.done = {tuple(item["key"]): item["value"] for item in lines}
        self.path = path
        self.batch = batch
        self.judge = ""
        if path.exists() and path.stat().st_size:
            with report.writing(path), open(path, "ab") as file:
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
                with report.writing(self.path):
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    with open(self.path, "ab") as file:
                        for key, value in zip(keys, values, strict=True):
                            self.done[key] = value
                            file.write(json.dumps({"key": key, "value": value}).encode() + b"\n")
        return [self.done[key] for key in todo]


def refuse_lost(reasons):
    """Raise UserError where most questions have no answer, so that none of them is recorded.

    reasons: of each question why it has none, or "".
    """
    lost = collections.Counter(reason for reason in reasons if reason)
    if len(reasons) >= 4 and 2 * lost.total() > len(reasons):
        raise UserError(
            f"--judge-url: {lost.total()} of {len(reasons)} questions have no answer "
            f"({lost.most_common(1)[0][0]}); look after the judge, then start again: what is "
            "finished is kept"
        )


def verdicts(futures):
    """The judge's Verdicts, unless most are missing."""
    got = [future.result() for future in futures]
    refuse_lost([verdict.reason for verdict in got])
    return got
