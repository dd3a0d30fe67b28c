"""A run as one HTML page that needs no network: curves, time, results, and a reader of transcripts with the trained tokens coloured.

    RUN/ metrics.jsonl, heldout.jsonl, dialogues.jsonl, eval/*.json, the tokenizer of its checkpoints  ->  RUN/report.html

The page's frame, style and script are data/report.html. What a model wrote is untrusted: text in the page is escaped, transcripts travel as
JSON in which no "<" can occur, the script only ever sets text, and the page's policy forbids every other script and every request.

    python eval.py report RUN [--baseline RUN2]
"""

import base64
import contextlib
import dataclasses
import hashlib
import html
import io
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from cli import UserError, command_line, option
from data_gen import DATA
from measure import diversity, figure

# ---- what a run folder holds ------------------------------------------------------------------------------------------------


def whole_lines(path):
    """The objects of a JSON Lines file, none where there is no file; a half line, left by a kill, is passed over."""
    with open(path, "rb") if Path(path).exists() else io.BytesIO() as file:
        for line in file:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def config_of(run):
    """The settings of a run as a dictionary, empty where its folder has no config.json."""
    file = Path(run, "config.json")
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def best_step(run):
    """The step with the highest held-out reward (of a warm start: the lowest held-out loss) so far; -1 without an evaluation."""
    held = [
        (row["heldout"], row["step"])
        for row in whole_lines(run / "metrics.jsonl")
        if "heldout" in row
    ]
    scored = [
        (-found["loss"] if found.get("loss") is not None else found.get("reward"), step)
        for found, step in held
    ]
    return max((pair for pair in scored if pair[0] is not None), default=(0.0, -1))[1]


def checkpoints_of(run):
    """The complete checkpoints of a run folder, in their order. What somebody else put beside them, a copy say, is not among them."""
    ours = [
        p
        for p in (run / "checkpoints").glob("step_*")
        if re.fullmatch(r"step_\d{6,}", p.name) and (p / "COMPLETE").exists()
    ]
    return sorted(ours, key=lambda p: int(p.name[5:]))


def locate(name):
    """(what to load, the folder of the run that it belongs to or None). A run folder stands for its best checkpoint by held-out reward,
    or, where none was measured or kept, for the newest complete one."""
    folder = Path(name)
    if (folder / "checkpoints").is_dir():
        steps = checkpoints_of(folder)
        if not steps:
            raise UserError(
                f"{name}: this run holds no complete checkpoint; let it train on, or name another folder"
            )
        folder = next((p for p in steps if p.name == f"step_{best_step(folder):06d}"), steps[-1])
    return (
        (str(folder), folder.parent.parent) if folder.parent.name == "checkpoints" else (name, None)
    )


@contextlib.contextmanager
def writing(path):
    """Inside this block an OSError means that `path`, which somebody named with --out, cannot be written: a UserError."""
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"--out {path}: cannot be written ({error.strerror}); name a file in a folder of yours"
        )


def write(path, text):
    """Write a file at once: whoever looks sees the old one or the new one. Raises UserError where it cannot be written."""
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        part.write_text(text, encoding="utf-8")
        part.replace(path)


@dataclasses.dataclass
class Run:
    """What the page needs of a run folder."""

    name: str
    config: dict
    steps: list  # metrics, one dictionary per step
    held: list  # held-out metrics, one per evaluation
    diverse: list  # measure.diversity of each step's dialogues
    kept: dict  # {scenario id: {(step, source): records}}: the first and the last step of each scenario
    scores: dict  # {(step, scenario id): mean reward in training}


def read_run(folder):
    """Read a run folder line by line, however long it is. Raises UserError where there is no metrics.jsonl."""
    if not Path(folder, "metrics.jsonl").exists():
        raise UserError(f"{folder}: there is no metrics.jsonl in it; name the folder of a run")
    metrics, diverse, kept, scores = list(whole_lines(Path(folder, "metrics.jsonl"))), [], {}, {}
    for file, source in (("heldout.jsonl", "held out"), ("dialogues.jsonl", "training")):
        for step, group in itertools.groupby(
            whole_lines(Path(folder, file)), key=lambda record: record["step"]
        ):
            records = list(group)
            if source == "training":
                diverse.append({"step": step, **diversity(records)})
            for record in records:
                if source == "training" and record["reward"] is not None:
                    scores.setdefault((step, record["scenario_id"]), []).append(record["reward"])
                slot = kept.setdefault(record["scenario_id"], {})
                slot.setdefault((step, source), []).append(record)
                for middle in sorted(key for key in slot if key[1] == source)[1:-1]:
                    del slot[middle]
    if config_of(folder).get("demonstrations"):
        raise UserError(
            f"{folder}: no dialogue was played in it; what a warm start learnt stands in its metrics.jsonl"
        )
    held = [{**m["heldout"], "step": m["step"]} for m in metrics if "heldout" in m]
    return Run(
        Path(folder).resolve().name,
        config_of(folder),
        [m for m in metrics if "heldout" not in m],
        held,
        diverse,
        kept,
        {key: float(np.mean(rewards)) for key, rewards in scores.items()},
    )


def gains(run, baseline):
    """(one row per step, a row of results): how much more the scenarios of a step earn than in the baseline's same step, where both played them.

    The steps of a run play different scenarios, which differ by more than a few steps teach: a rise from the first steps to the last shows
    little. Beside an untrained model (train.py --lr 0, the same seed) that is gone. The row of results is of the last third of the steps.
    """
    both = [
        (step, name, reward - baseline.scores[step, name])
        for (step, name), reward in run.scores.items()
        if (step, name) in baseline.scores
    ]
    steps = sorted({step for step, *_ in both})
    late = set(steps[len(steps) * 2 // 3 :])
    rows = [
        {"step": step, "gain": float(np.mean([gain for at, _, gain in both if at == step]))}
        for step in steps
    ]
    return rows, figure(
        "training reward", "A - B", [(name, gain) for step, name, gain in both if step in late]
    )


# ---- pictures -----------------------------------------------------------------------------------------------------------------

BLUE, ORANGE, GREEN, GREY, INK = (
    "#4a7fc1",
    "#e08a3c",
    "#4f9d69",
    "#9aa0a6",
    "#80868e",
)  # readable on white and on black


def line(label, colour, rows, key, low=None, high=None):
    """A line of a chart: `key` of rows over their steps, with a band from `low` to `high`."""
    column = lambda name: np.array(
        [row.get(name) for row in rows], dtype=float
    )  # None becomes NaN, which is a gap
    return label, colour, column("step"), column(key), (column(low), column(high)) if low else None


def chart(title, lines, kind=""):
    """A picture as a <figure> with an SVG inside. kind "stacked": bars on top of each other; "from 0": the axis begins there."""
    from matplotlib.figure import (
        Figure,
    )  # here, because train.py imports this file too and draws nothing

    canvas = Figure(figsize=(4.6, 2.5), layout="constrained")
    axes, floor = canvas.subplots(), 0.0
    for label, colour, steps, values, band in lines:
        if kind == "stacked":
            axes.bar(steps, values, 0.8, floor, label=label, color=colour)
            floor = floor + values
            continue
        axes.plot(
            steps,
            values,
            color=colour,
            label=label,
            linewidth=1.6,
            marker="o",
            markersize=3 if len(steps) < 40 else 0,
        )
        if band:
            axes.fill_between(steps, *band, color=colour, alpha=0.18, linewidth=0)
    if kind:
        axes.set_ylim(0, 1.03 * max(1.0, axes.get_ylim()[1]))
    axes.set_xlabel("step", color=INK, fontsize=8)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.grid(axis="y", color=INK, alpha=0.2, linewidth=0.6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[:].set_visible(False)
    axes.legend(
        fontsize=7.5,
        frameon=False,
        labelcolor=INK,
        ncols=4,
        loc="lower left",
        bbox_to_anchor=(-0.02, 0.98),
        columnspacing=1.2,
        handlelength=1.2,
    )
    svg = io.BytesIO()
    canvas.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    source = "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()
    return f'<figure><figcaption>{html.escape(title)}</figcaption><img alt="{html.escape(title)}" src="{source}"></figure>'


def rewards(run, label, colour, held_colour):
    """The lines of a run's rewards. The band in training is mean +- 1.96 standard errors over a step's dialogues (as if those of
    a scenario were independent), the held-out one a bootstrap over scenarios."""
    n = run.config.get("scenarios_per_step", 1) * run.config.get("group_size", 1)
    known = [row for row in run.steps if row["reward_mean"] is not None]
    error = lambda row: 1.96 * (row["reward_std"] or 0.0) / (n - row["missing_rewards"]) ** 0.5
    rows = [
        {**row, "low": row["reward_mean"] - error(row), "high": row["reward_mean"] + error(row)}
        for row in known
    ]
    held = (
        [line(f"held out{label}", held_colour, run.held, "reward", "reward_low", "reward_high")]
        if run.held
        else []
    )
    return [line(f"training{label}", colour, rows, "reward_mean", "low", "high")] + held


def curves(run, baseline=None):
    """All pictures of a run, the rewards of a baseline beside its own."""
    return "".join(
        [
            chart(
                "Reward, with 95% bands",
                rewards(run, "", BLUE, ORANGE)
                + (rewards(baseline, f", {baseline.name}", GREY, INK) if baseline else []),
            ),
            chart(
                f"Reward above {baseline.name}, same scenarios",
                [line("difference", BLUE, gains(run, baseline)[0], "gain")],
            )
            if baseline
            else "",
            chart(
                "Seconds of a step",
                [
                    line("play", BLUE, run.steps, "seconds_play"),
                    line("waiting for the judge", ORANGE, run.steps, "seconds_judge"),
                    line("learn", GREEN, run.steps, "seconds_learn"),
                ],
                "stacked",
            ),
            chart(
                "Agreement, and texts cut off",
                [
                    line("agreed", BLUE, run.steps, "agreed_rate"),
                    line("at once", GREEN, run.diverse, "agreed_at_once"),
                    line("cut off", ORANGE, run.steps, "truncated_rate"),
                ],
                "from 0",
            ),
            chart(
                "What the judge left open",
                [
                    line("questions", ORANGE, run.steps, "judge_failures"),
                    line("rewards", BLUE, run.steps, "missing_rewards"),
                ],
                "from 0",
            ),
            chart(
                "Length of the joint solution",
                [line("words", BLUE, run.diverse, "final_words")],
                "from 0",
            ),
            chart(
                "Diversity and grounding",
                [
                    line("distinct-2", BLUE, run.diverse, "distinct_2"),
                    line("grounding", GREEN, run.diverse, "grounding"),
                    line("overlap", ORANGE, run.diverse, "overlap"),
                    line("repetition", GREY, run.diverse, "repetition"),
                ],
                "from 0",
            ),
        ]
    )


# ---- the reader of transcripts ------------------------------------------------------------------------------------------------


def spans(sample, decode):
    """A sample as [text, log-prob] pairs: each sampled token by itself; what was only read in one piece, with None."""
    out = []
    for sampled, part in itertools.groupby(
        zip(sample["ids"], sample["mask"], sample["logprobs"]), key=lambda token: bool(token[1])
    ):
        part = list(part)
        out += (
            [[decode([i]), round(logp, 2)] for i, _, logp in part]
            if sampled
            else [[decode([i for i, *_ in part]), None]]
        )
    return out


def readable(record, label, trained, decode):
    """One dialogue for the reader; `trained` says whose tokens are shown: those of the dialogue, the final, or both."""
    names = [persona["name"] for persona in record["personas"]]
    samples = [
        (s["speaker"], sample)
        for s in record["streams"]
        for sample in s["samples"]
        if trained != "final"
    ]
    if trained != "dialogue" and record.get("final_sample"):
        samples.append((0, record["final_sample"]))
    streams = (
        [
            {"speaker": me, "name": names[me], "spans": spans(sample, decode)}
            for me, sample in samples
        ]
        if decode
        else []
    )
    return {
        "label": label,
        "streams": streams,
        "raw": "\n".join([record["judge"]["raw"], *record["judge"]["failures"]]).strip(),
        **{
            key: record[key]
            for key in ("turns", "stop", "final", "final_truncated", "reward", "advantage")
        },
    }


def reader(run, limit, decode):
    """Per scenario the best and the worst dialogue of its first and of its last step; first the scenarios with most steps between.

    The page opens on the first and the last of a scenario's dialogues: so these are the best before and the best after training.
    """
    out, trained = [], run.config.get("train_tokens", "dialogue")
    for name, slot in sorted(run.kept.items(), key=lambda item: min(item[1])[0] - max(item[1])[0])[
        :limit
    ]:
        dialogues = []
        for (step, source), records in sorted(slot.items()):
            ranked = sorted(
                records, key=lambda r: (r["reward"] is not None, r["reward"]), reverse=True
            )
            ends = list({"best": ranked[0], "worst": ranked[-1]}.items())[: len(ranked)]
            for rank, record in ends[::-1] if (step, source) == max(slot) else ends:
                dialogues.append(
                    readable(
                        record, f"step {step}, {source}, {rank} of {len(ranked)}", trained, decode
                    )
                )
        case = next(iter(slot.values()))[0]
        out.append(
            {
                "id": name,
                "dilemma": case["dilemma"],
                "personas": case["personas"],
                "dialogues": dialogues,
            }
        )
    return out


# ---- the page -------------------------------------------------------------------------------------------------------------------


def cells(row):
    """A row of results as texts: figure, of what, value, interval, counts."""
    number = lambda x: "none" if x is None else f"{x:.3f}"
    counts = [f"n {row['n']} in {row['scenarios']}"]
    counts += [
        f"{row[key]} {key}"
        for key in ("pairs", "wins", "losses", "ties", "inconsistent", "missing")
        if row.get(key)
    ]
    interval = "" if row["low"] is None else f"{number(row['low'])} to {number(row['high'])}"
    return [row["figure"], row["of"], number(row["value"]), interval, ", ".join(counts)]


def results(folder):
    """The tables of all results in a run's eval folder, as HTML."""
    tables = []
    for file in sorted(Path(folder, "eval").glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        models = "; ".join(
            [f"{side} is {settings['model']}" for side, settings in found["settings"].items()]
            + [found["judge"]]
        )
        rows = [
            "<tr{}>{}</tr>".format(
                ' class="difference"' * (" - " in row["of"]),
                "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row)),
            )
            for row in found["rows"]
        ]
        tables.append(
            f"<h3>{html.escape(file.stem)}</h3><p>{html.escape(models)}</p><div class=scroll><table><tr><th>figure<th>of<th>value"
            f"<th>95% interval<th>counts (n in how many scenarios)</tr>{''.join(rows)}</table></div>"
        )
    return (
        "".join(tables)
        or "<p>None yet: python eval.py conflict --model RUN writes its results into the run's folder.</p>"
    )


def facts(run, baseline=None):
    """The numbers at the top of the page, as HTML."""
    way = lambda values: f"{values[0]:.2f} → {values[-1]:.2f}" if values else "none"
    shown = {
        "reward in training, first and last step": way(
            [row["reward_mean"] for row in run.steps if row["reward_mean"] is not None]
        ),
        "held-out reward, first and last": way(
            [row["reward"] for row in run.held if row["reward"] is not None]
        ),
        "steps": len(run.steps),
        "minutes": f"{sum(row['seconds_step'] for row in run.steps) / 60:.1f}",
        "rewards that are missing": sum(row.get("missing_rewards", 0) for row in run.steps),
        "questions that the judge left open": sum(row["judge_failures"] for row in run.steps),
    }
    if baseline:
        row = gains(run, baseline)[1]
        shown[
            f"above {baseline.name} on the same scenarios, last third of the steps ({cells(row)[3] or 'no interval'})"
        ] = "none" if row["value"] is None else f"{row['value']:+.2f}"
    return "".join(
        f"<div><b>{html.escape(str(value))}</b><span>{html.escape(name)}</span></div>"
        for name, value in shown.items()
    )


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """What the report shows."""

    baseline: str = option(
        "",
        "a second run folder: its rewards in grey, and the difference on scenarios that both played",
    )
    scenarios: int = option(24, "scenarios whose transcripts can be read", low=0)
    out: str = option("", "the page (empty: RUN/report.html)")


def main(argv):
    """`python eval.py report RUN`. Returns the exit code."""
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        raise UserError(
            "report: name the folder of a run first, such as: python eval.py report runs/debug-0"
        )
    folder, settings = (
        argv[0],
        command_line(
            ReportSettings, argv if argv[0].startswith("-") else argv[1:], "eval.py report RUN"
        ),
    )
    run, decode = read_run(folder), None
    try:
        decode = AutoTokenizer.from_pretrained(locate(folder)[0]).decode
    except (UserError, OSError, ValueError) as error:
        print(
            f"no tokens in the transcripts, for lack of a checkpoint's tokenizer ({str(error).splitlines()[0][:120]})",
            file=sys.stderr,
        )
    page, config = (DATA / "report.html").read_text(encoding="utf-8"), run.config
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL).group(1)
    judge = config.get("judge_model") or config.get("judge_url") or "the embedded small judge"
    about = f"{config.get('model')}, recipe {config.get('recipe')}, seed {config.get('seed')}, judged by {judge}"
    baseline = read_run(settings.baseline) if settings.baseline else None
    slots = {
        "title": html.escape(run.name),
        "subtitle": html.escape(about),
        "facts": facts(run, baseline),
        "curves": curves(run, baseline),
        "results": results(folder),
        "settings": html.escape(json.dumps(config, indent=1)),
        "hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "data": json.dumps(reader(run, settings.scenarios, decode)).replace("<", "\\u003c"),
    }  # only "<" can end a script element
    out = Path(settings.out or Path(folder) / "report.html")
    write(out, re.sub(r"@@(\w+)@@", lambda slot: slots[slot.group(1)], page))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; open it in any browser")
    return 0
