"""A run as one HTML page.

    metrics.jsonl, dialogues.jsonl, heldout.jsonl, eval/*.json, a checkpoint's tokenizer
        -> curves, results, transcripts with the trained tokens coloured -> report.html

The page is data/report.html.j2 and needs no network. What a model wrote is untrusted: the template
escapes it, transcripts travel as JSON without any "<", and the page's policy forbids every script
but its own and every request.

    python eval.py report RUN
"""

import base64
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import sys
from pathlib import Path

import jinja2
import numpy as np
from transformers import AutoTokenizer

from checkpoint import config_of, locate, whole_lines, write_atomically
from cli import UserError, command_line, option
from dataset import DATA, reading_json, shape_fault
from progress import closing_words

# ---- the page on disk ----------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path):
    """Inside this block an OSError means that `path`, named with --out, cannot be written."""
    try:
        yield
    except OSError as error:
        hint = "make room, or name a file in a folder of yours"
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); {hint}") from error


def refuse_unwritable(path, begins=b""):
    """Raise UserError where `path` cannot be made, or begins otherwise. It makes nothing yet."""
    with writing(path):
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        if not os.access(f"{folder}/.", os.W_OK):
            raise OSError(13, f"{folder} is no folder to write to")
        there = path.read_bytes() if path.exists() else b""
    if there and not (begins and there.startswith(begins)):
        raise UserError(f"--out {path}: is there already, to be kept; name another file")


def write(path, text):
    """Replace a file at once. Raises UserError where it cannot be written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)


# ---- what the page shows of a run ----------------------------------------------------------------


@dataclasses.dataclass
class ReportedRun:
    """What the page needs of a run folder."""

    name: str
    config: dict
    steps: list  # metrics, one dict per step
    held: list  # held-out metrics, one per evaluation
    kept: dict  # {scenario id: {(step, source): records}}: its first and last step per source


STEP = {"step": int, "missing_rewards": int, "judge_failures": int, "seconds_step": float}
TURN = ("speaker", "text", "truncated")


def read_results(folder):
    """{name: results} of a run's eval/*.json, their rows as `cells`."""
    found = {}
    for path in sorted(Path(folder, "eval").glob("*.json")):
        with reading_json(f"{path}:", "move it away"):
            result = json.loads(path.read_text(encoding="utf-8"))
            about = {"settings": dict(result["settings"]), "judge": result["judge"]}
            found[path.stem] = {**about, "rows": [cells(row) for row in result["rows"]]}
    return found


def read_run(folder):
    """Read a run folder line by line, however long it is. Raises UserError where it is none."""
    if not os.path.exists(Path(folder, "metrics.jsonl")):  # nor where nobody may look
        raise UserError(f"{folder}: there is no metrics.jsonl in it; name the folder of a run")
    run = ReportedRun(Path(folder).resolve().name, config_of(folder), [], [], {})
    if run.config.get("demonstrations"):
        raise UserError(f"{folder}: a warm start plays no dialogue; read its metrics.jsonl")
    with reading_json(f"{folder}/metrics.jsonl: a line", "take it out"):
        for row in whole_lines(Path(folder, "metrics.jsonl")):
            if "heldout" in row:
                run.held.append({**row["heldout"], "step": row["step"]})
            elif fault := shape_fault(row, STEP):
                raise ValueError(fault)
            else:
                run.steps.append(row)
    for file, source in (("heldout.jsonl", "held out"), ("dialogues.jsonl", "training")):
        with reading_json(f"{folder}/{file}: a line", "take it out"):
            for record in whole_lines(Path(folder, file)):
                keep(run.kept.setdefault(record["scenario_id"], {}), source, record)
    return run


def keep(slot, source, record):
    """File a record of a scenario, and forget the steps between its first and its last one."""
    slot.setdefault((int(record["step"]), source), []).append(record)
    for middle in sorted(key for key in slot if key[1] == source)[1:-1]:
        del slot[middle]


# ---- pictures ------------------------------------------------------------------------------------

CURVES = {  # picture: {line: key in metrics.jsonl}
    "Seconds of a step": {
        "play": "seconds_play",
        "waiting for the judge": "seconds_judge",
        "learn": "seconds_learn",
    },
    "Agreement, and texts cut off": {
        "agreed": "agreed_rate",
        "cut off": "truncated_rate",
        "at once": "agreed_at_once",
    },
    "What the judge left open": {"rewards": "missing_rewards", "questions": "judge_failures"},
    "Length of the joint solution": {"words": "final_words"},
    "Diversity and grounding": {
        "distinct-2": "distinct_2",
        "overlap": "overlap",
        "grounding": "grounding",
        "repetition": "repetition",
    },
}


@dataclasses.dataclass
class Line:
    """A line of a chart: `key` of rows over their steps, with a band between two other keys."""

    label: str
    rows: list
    key: str
    band: tuple = ()

    def column(self, key):
        """Numbers of the rows; None becomes NaN, which is a gap."""
        return np.array([row.get(key) for row in self.rows], dtype=float)


def chart(title, lines, stacked=False, from_zero=True):
    """A picture for the template: {title, source}, the source an SVG as a data URI."""
    # Here, because eval.py and train.py import this file too and draw nothing.
    os.environ["MPLBACKEND"] = "agg"  # no window, whatever is set
    from matplotlib import style
    from matplotlib.figure import Figure

    svg = io.BytesIO()
    floor = 0.0  # of the next bars
    with style.context(DATA / "report.mplstyle"):
        canvas = Figure()
        axes = canvas.subplots()
        for line in lines:
            steps, values = line.column("step"), line.column(line.key)
            if stacked:
                axes.bar(steps, values, 0.8, floor, label=line.label)
                floor = floor + values
                continue
            form = "o-" if len(steps) < 40 else "-"
            (drawn,) = axes.plot(steps, values, form, label=line.label)
            if line.band:
                low, high = map(line.column, line.band)
                colour = drawn.get_color()
                axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        if from_zero:
            axes.set_ylim(0, 1.03 * max(1.0, axes.get_ylim()[1]))
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(ncols=4, bbox_to_anchor=(-0.02, 0.98))
        canvas.savefig(svg, metadata={"Date": None})
    data = base64.b64encode(svg.getvalue()).decode()
    return {"title": title, "source": "data:image/svg+xml;base64," + data}


def reward_lines(run):
    """The Lines of a run's rewards, in training and held out.

    The band in training is mean +- 1.96 standard errors over a step's dialogues (as if those of
    a scenario were independent), the held-out one a bootstrap over scenarios.
    """
    played = run.config.get("scenarios_per_step", 1) * run.config.get("group_size", 1)
    rows = []
    for row in run.steps:
        mean = row.get("reward_mean")
        if mean is not None:
            judged = max(1, played - row["missing_rewards"])
            error = 1.96 * (row.get("reward_std") or 0.0) / judged**0.5
            rows.append({**row, "low": mean - error, "high": mean + error})
    lines = [Line("training", rows, "reward_mean", ("low", "high"))]
    if run.held:
        lines.append(Line("held out", run.held, "reward", ("reward_low", "reward_high")))
    return lines


def curves(run):
    """All pictures of a run."""
    pictures = [chart("Reward, with 95% bands", reward_lines(run), from_zero=False)]
    for title, keys in CURVES.items():
        lines = [Line(label, run.steps, key) for label, key in keys.items()]
        pictures.append(chart(title, lines, stacked=title == "Seconds of a step"))
    return pictures


# ---- transcripts ---------------------------------------------------------------------------------


def spans(sample, decode):
    """A sample as [text, log-prob] pairs: each sampled token; what was only read, with None."""
    found = []
    tokens = zip(sample["ids"], sample["mask"], sample["logprobs"], strict=True)
    for sampled, part in itertools.groupby(tokens, key=lambda token: bool(token[1])):
        part = list(part)
        if sampled:
            found += [[decode([i]), round(logprob, 2)] for i, _, logprob in part]
        else:
            found.append([decode([i for i, _, _ in part]), None])
    return found


def readable(record, label, trained, decode):
    """One dialogue for the page; trained: whether dialogue, final or both were, and are shown."""
    samples = []
    if trained != "final":
        for stream in record["streams"]:
            samples += [(stream["speaker"], sample) for sample in stream["samples"]]
    if trained != "dialogue" and record.get("final_sample"):
        samples.append((0, record["final_sample"]))
    streams = []
    for speaker, sample in samples if decode else []:
        name = record["personas"][speaker]["name"]
        streams.append({"speaker": speaker, "name": name, "spans": spans(sample, decode)})
    said = [record["judge"]["raw"], *record["judge"]["failures"]]
    shown = ("stop", "final", "final_truncated", "reward", "advantage")
    kept = {key: record[key] for key in shown}
    kept["turns"] = [{key: turn[key] for key in TURN} for turn in record["turns"]]
    return {"label": label, "streams": streams, "raw": "\n".join(said).strip(), **kept}


def rank_of(record):
    """What dialogues are ranked by: a missing reward is the worst."""
    return (record["reward"] is not None, record["reward"] or 0.0)


def transcripts(run, limit, decode):
    """Per scenario its best and worst dialogues of the first and the last step.

    First come the scenarios with most steps between. The page opens on a scenario's first and last
    dialogue, so these are the best before and the best after training.
    """
    found = []
    trained = run.config.get("train_tokens", "dialogue")
    by_distance = sorted(run.kept.items(), key=lambda item: min(item[1])[0] - max(item[1])[0])
    for name, slot in by_distance[:limit]:
        what = f"{run.name}: a line of scenario {name} in dialogues.jsonl or heldout.jsonl"
        with reading_json(what, "take it out"):
            dialogues = []
            for (step, source), records in sorted(slot.items()):
                ranked = sorted(records, key=rank_of, reverse=True)
                ends = [("best", ranked[0]), ("worst", ranked[-1])][: len(ranked)]
                if (step, source) == max(slot):
                    ends.reverse()
                for rank, record in ends:
                    label = f"step {step}, {source}, {rank} of {len(ranked)}"
                    dialogues.append(readable(record, label, trained, decode))
            case = {key: record[key] for key in ("dilemma", "personas")}
        found.append({"id": name, "dialogues": dialogues, **case})
    return found


# ---- the page ------------------------------------------------------------------------------------


def cells(row):
    """A ResultRow that was written, a dict, as texts: figure, of what, value, interval, counts."""
    value = "none" if row["value"] is None else f"{row['value']:.3f}"
    interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
    counts = [f"n {row['n']} in {row['scenarios']}"]
    for name in ("pairs", "wins", "losses", "ties", "inconsistent", "missing"):
        if row.get(name):
            counts.append(f"{row[name]} {name}")
    return [str(row["figure"]), str(row["of"]), value, interval, ", ".join(counts)]


def decoder(folder):
    """`decode` of a run's tokenizer, or None, with a warning, where it has none."""
    try:
        return AutoTokenizer.from_pretrained(locate(folder)[0]).decode
    except (UserError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        missing = "no tokens in the transcripts, for lack of a checkpoint's tokenizer"
        print(f"{missing} ({reason})", file=sys.stderr)


def earned(run):
    """What training earned on the scenarios that were played again, in words."""
    scenarios = set().union(*(row.get("rewards", ()) for row in run.steps))
    if not scenarios:
        return ""
    last, per_step = run.steps[-1]["step"], run.config["scenarios_per_step"]
    return closing_words(run.steps, last, per_step, len(scenarios))


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """What the report shows."""

    scenarios: int = option(24, "scenarios whose transcripts can be read", low=0)
    out: str = option("", "the page (empty: RUN/report.html)")


def main(argv):
    """`python eval.py report RUN`. Returns the exit code."""
    named = bool(argv) and not argv[0].startswith("-")
    settings = command_line(ReportSettings, argv[named:], "eval.py report RUN")
    if not named:
        raise UserError(
            "report: name the folder of a run first: python eval.py report runs/debug-0"
        )
    folder = argv[0]
    out = Path(settings.out or Path(folder) / "report.html")
    run = read_run(folder)
    source = (DATA / "report.html.j2").read_text(encoding="utf-8")
    refuse_unwritable(out, source.splitlines()[0].encode())
    script = re.search(r"<script>(.*?)</script>", source, re.DOTALL)[1]
    page = jinja2.Environment(autoescape=True).from_string(source)
    with reading_json(f"{folder}/metrics.jsonl: a line", "take it out"):
        pictures, gain = curves(run), earned(run)
    text = page.render(
        run=run,
        config=json.dumps(run.config, indent=1),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        curves=pictures,
        earned=gain,
        results=read_results(folder),
        transcripts=transcripts(run, settings.scenarios, decoder(folder)),
    )
    write(out, text)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; open it in any browser")
    return 0
