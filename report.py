"""The numbers of a run, how sure they are, and one HTML page that shows them.

    texts of a dialogue -> overlap, repetition, grounding ... -> figure: a Row with its 95% interval
    metrics.jsonl, dialogues.jsonl, heldout.jsonl, eval/*.json, a checkpoint's tokenizer
        -> curves, results, transcripts with the trained tokens coloured -> report.html

The page is data/report.html.j2 and needs no network. What a model wrote is untrusted: the template
escapes it, transcripts travel as JSON without any "<", and the page's policy forbids every script
but its own and every request. Left out: embeddings, perplexity under a third model, p-values.

    python eval.py report RUN [--baseline RUN2]
"""

import base64
import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import re
import sys
from pathlib import Path

import jinja2
import numpy as np
from transformers import AutoTokenizer

from checkpoint import config_of, locate, whole_lines
from cli import UserError, command_line, option
from data_gen import DATA

# ---- the page on disk ----------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path):
    """Inside this block an OSError means that `path`, named with --out, cannot be written."""
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"--out {path}: cannot be written ({error.strerror}); name a file in a folder of yours"
        ) from error


def write(path, text):
    """Replace a file at once. Raises UserError where it cannot be written."""
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        part.write_text(text, encoding="utf-8")
        part.replace(path)


# ---- numbers of texts ----------------------------------------------------------------------------

COMMON = set((DATA / "common_words.txt").read_text(encoding="utf-8").split())


def words(text):
    """Lower-case words; an apostrophe inside belongs to the word."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def ngrams(texts, n):
    """All word n-grams of a list of texts, in order; none spans two texts."""
    grams = []
    for text in texts:
        said = words(text)
        grams += [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
    return grams


def overlap(one, other, n=3):
    """Share of the distinct n-grams of the side with fewer that the other says too, or None."""
    ours = set(ngrams(one, n))
    theirs = set(ngrams(other, n))
    fewer = min(len(ours), len(theirs))
    return len(ours & theirs) / fewer if fewer else None


def distinct(texts, n=2):
    """Distinct n-grams over all n-grams (Li et al., arXiv 1510.03055); None without any."""
    grams = ngrams(texts, n)
    return len(set(grams)) / len(grams) if grams else None


def repetition(texts, n=4):
    """Share of n-grams that stood in the same text before; None without any."""
    total = len(ngrams(texts, n))
    fresh = sum(len(set(ngrams([text], n))) for text in texts)
    return (total - fresh) / total if total else None


def stems(text):
    """The first five letters of each content word: of four letters or more, and not common."""
    return [word[:5] for word in words(text) if len(word) >= 4 and word not in COMMON]


def grounding(final, sources):
    """Share of the final's content words whose stems occur in the sources; None without any."""
    known = set(stems("\n".join(sources)))
    used = stems(final)
    return sum(stem in known for stem in used) / len(used) if used else None


def texts_of(record):
    """All that was written in a dialogue, a line of dialogues.jsonl."""
    return [turn["text"] for turn in record["turns"]] + [record["final"] or ""]


def text_measures(record):
    """{figure: number} of the texts of one dialogue; None where it has no such figure."""
    turns, final = record["turns"], record["final"]
    first = [turn["text"] for turn in turns if turn["speaker"] == 0]
    second = [turn["text"] for turn in turns if turn["speaker"] == 1]
    told = [f"{persona['name']} {persona['creed']}" for persona in record["personas"]]
    return {
        "agreed_at_once": float(record["agreed"] and len(turns) <= 2) if turns else None,
        "final_words": None if final is None else len(words(final)),
        "overlap": overlap(first, second),
        "distinct_2": distinct(texts_of(record)),
        "repetition": repetition(texts_of(record)),
        "grounding": grounding(final or "", [record["dilemma"], *told]),
    }


def diversity(records):
    """What a batch of dialogues is like: means of their figures, and two over all their texts."""
    measured = [text_measures(record) for record in records]
    found = {}
    for name in ("overlap", "repetition", "grounding", "final_words", "agreed_at_once"):
        known = [row[name] for row in measured if row[name] is not None]
        found[name] = float(np.mean(known)) if known else None
    texts = []
    for record in records:
        texts += texts_of(record)
    openings = [tuple(words(r["final"])[:4]) for r in records if r["final"]]
    found["distinct_2"] = distinct(texts)
    found["distinct_openings"] = len(set(openings)) / len(openings) if openings else None
    return found


RISEN = {  # above this, and not so in the first step: a sign of collapse
    "overlap": (0.5, "the agents say the same"),
    "repetition": (0.3, "texts repeat themselves"),
    "agreed_at_once": (0.9, "they agree at once"),
}
HALVED = {
    "distinct_2": "few different word pairs",
    "distinct_openings": "finals begin alike",
    "grounding": "finals leave the dilemma",
    "final_words": "finals shrink",
}


def collapse(now, first):
    """What in `now` looks like collapse beside `first`, both of `diversity`; "" if nothing does."""
    signs = []
    for name, (limit, sign) in RISEN.items():
        if now[name] is not None and now[name] > limit >= (first[name] or 0.0):
            signs.append(f"{sign} ({name})")
    for name, sign in HALVED.items():
        if None not in (now[name], first[name]) and now[name] < first[name] / 2:
            signs.append(f"{sign} ({name})")
    return ", ".join(signs)


# ---- how sure a number is ------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """A row of results: a figure of A, of B or of their difference, with interval and counts."""

    figure: str
    of: str
    value: float = None
    low: float = None  # the 95% interval
    high: float = None
    n: int = 0  # items that are in the value
    scenarios: int = 0  # that these items lie in
    missing: int = 0  # items without a verdict
    pairs: int = None  # of A against B: how many there were, and how they ended
    wins: int = None
    losses: int = None
    ties: int = None
    inconsistent: int = None


def cells(row):
    """A Row that was written, a dict, as texts: figure, of what, value, interval, counts."""
    value = "none" if row["value"] is None else f"{row['value']:.3f}"
    interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
    counts = [f"n {row['n']} in {row['scenarios']}"]
    for name in ("pairs", "wins", "losses", "ties", "inconsistent", "missing"):
        if row.get(name):
            counts.append(f"{row[name]} {name}")
    return [row["figure"], row["of"], value, interval, ", ".join(counts)]


def finite(number):
    """A number for JSON; None for NaN and infinities."""
    return round(float(number), 6) if np.isfinite(number) else None


def bootstrap(columns, scenarios, statistic, rounds=1000):
    """The 95% interval of statistic(*columns), columns (k, n), from a bootstrap (Efron 1979).

    It draws whole scenarios, for dialogues on one scenario are not independent. scenarios: for
    each, the indices of its items. Seeded. (None, None) where the statistic is never finite.
    """
    rng = np.random.default_rng(0)
    values = []
    for _ in range(rounds):
        drawn = rng.integers(0, len(scenarios), len(scenarios))
        values.append(statistic(*columns[:, np.concatenate([scenarios[i] for i in drawn])]))
    if not np.isfinite(values).any():
        return None, None
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return finite(low), finite(high)


def figure(name, of, items, statistic=np.mean, **counts):
    """The Row of statistic(*columns) of items (scenario, number, ...).

    An item with a None is left out and counted as missing. No interval with under two scenarios.
    """
    whole = [item for item in items if None not in item]
    columns = np.array([item[1:] for item in whole], dtype=float).T  # (numbers of an item, items)
    members = collections.defaultdict(list)
    for i, (scenario, *_) in enumerate(whole):
        members[scenario].append(i)
    counts = {"missing": len(items) - len(whole), **counts}
    row = Row(name, of, n=len(whole), scenarios=len(members), **counts)
    with np.errstate(invalid="ignore", divide="ignore"):
        if whole:
            row.value = finite(statistic(*columns))
        if len(members) > 1:
            row.low, row.high = bootstrap(columns, list(members.values()), statistic)
    return row


# ---- what the page shows of a run ----------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What the page needs of a run folder."""

    name: str
    config: dict
    steps: list  # metrics, one dict per step
    held: list  # held-out metrics, one per evaluation
    kept: dict  # {scenario id: {(step, source): records}}: its first and last step per source
    scores: dict  # {(step, scenario id): mean reward in training}


def read_run(folder):
    """Read a run folder line by line, however long it is. Raises UserError where it is none."""
    if not Path(folder, "metrics.jsonl").exists():
        raise UserError(f"{folder}: there is no metrics.jsonl in it; name the folder of a run")
    run = Run(Path(folder).resolve().name, config_of(folder), [], [], {}, {})
    if run.config.get("demonstrations"):
        raise UserError(
            f"{folder}: no dialogue was played in it; what a warm start learnt stands in its "
            "metrics.jsonl"
        )
    for row in whole_lines(Path(folder, "metrics.jsonl")):
        if "heldout" in row:
            run.held.append({**row["heldout"], "step": row["step"]})
        else:
            run.steps.append(row)
    for file, source in (("heldout.jsonl", "held out"), ("dialogues.jsonl", "training")):
        for record in whole_lines(Path(folder, file)):
            keep(run.kept.setdefault(record["scenario_id"], {}), source, record)
            if source == "training" and record["reward"] is not None:
                at = record["step"], record["scenario_id"]
                run.scores.setdefault(at, []).append(record["reward"])
    run.scores = {at: float(np.mean(rewards)) for at, rewards in run.scores.items()}
    return run


def keep(slot, source, record):
    """File a record of a scenario, and forget the steps between its first and its last one."""
    slot.setdefault((record["step"], source), []).append(record)
    for middle in sorted(key for key in slot if key[1] == source)[1:-1]:
        del slot[middle]


def gains(run, baseline):
    """([{step, gain}], Row of the last third): reward above the baseline's on the same scenarios.

    Only what both played at the same step counts. The steps of a run play different scenarios,
    which differ by more than a few steps teach: beside an untrained model (train.py --lr 0, the
    same seed) that is gone.
    """
    both = collections.defaultdict(list)
    for (step, scenario), reward in sorted(run.scores.items()):
        if (step, scenario) in baseline.scores:
            both[step].append((scenario, reward - baseline.scores[step, scenario]))
    rows = [
        {"step": step, "gain": float(np.mean([gain for _, gain in pairs]))}
        for step, pairs in both.items()
    ]
    late = itertools.chain.from_iterable(list(both.values())[len(both) * 2 // 3 :])
    return rows, figure("training reward", "A - B", list(late))


# ---- pictures ------------------------------------------------------------------------------------

CURVES = [  # picture, line, key in metrics.jsonl
    ("Seconds of a step", "play", "seconds_play"),
    ("Seconds of a step", "waiting for the judge", "seconds_judge"),
    ("Seconds of a step", "learn", "seconds_learn"),
    ("Agreement, and texts cut off", "agreed", "agreed_rate"),
    ("Agreement, and texts cut off", "cut off", "truncated_rate"),
    ("Agreement, and texts cut off", "at once", "agreed_at_once"),
    ("What the judge left open", "rewards", "missing_rewards"),
    ("What the judge left open", "questions", "judge_failures"),
    ("Length of the joint solution", "words", "final_words"),
    ("Diversity and grounding", "distinct-2", "distinct_2"),
    ("Diversity and grounding", "overlap", "overlap"),
    ("Diversity and grounding", "grounding", "grounding"),
    ("Diversity and grounding", "repetition", "repetition"),
]


@dataclasses.dataclass
class Line:
    """A line of a chart: `key` of rows over their steps, with a band between two other keys."""

    label: str
    rows: list
    key: str
    band: tuple = ()
    colour: str = None  # the style's next one

    def column(self, key):
        """Numbers of the rows; None becomes NaN, which is a gap."""
        return np.array([row.get(key) for row in self.rows], dtype=float)


def chart(title, lines, stacked=False, from_zero=True):
    """A picture for the template: {title, source}, the source an SVG as a data URI."""
    # Here, because train.py imports this file too and draws nothing.
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
            (drawn,) = axes.plot(steps, values, "o-", label=line.label, color=line.colour)
            if len(steps) >= 40:
                drawn.set_marker("")
            if line.band:
                low, high = map(line.column, line.band)
                axes.fill_between(
                    steps, low, high, color=drawn.get_color(), alpha=0.18, linewidth=0
                )
        if from_zero:
            axes.set_ylim(0, 1.03 * max(1.0, axes.get_ylim()[1]))
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(ncols=4, bbox_to_anchor=(-0.02, 0.98))
        canvas.savefig(svg, metadata={"Date": None})
    data = base64.b64encode(svg.getvalue()).decode()
    return {"title": title, "source": "data:image/svg+xml;base64," + data}


def rewards(run, suffix="", colour=None, held_colour=None):
    """The Lines of a run's rewards, in training and held out.

    The band in training is mean +- 1.96 standard errors over a step's dialogues (as if those of
    a scenario were independent), the held-out one a bootstrap over scenarios.
    """
    played = run.config.get("scenarios_per_step", 1) * run.config.get("group_size", 1)
    rows = []
    for row in run.steps:
        mean = row["reward_mean"]
        if mean is not None:
            error = 1.96 * (row["reward_std"] or 0.0) / (played - row["missing_rewards"]) ** 0.5
            rows.append({**row, "low": mean - error, "high": mean + error})
    lines = [Line("training" + suffix, rows, "reward_mean", ("low", "high"), colour)]
    if run.held:
        band = ("reward_low", "reward_high")
        lines.append(Line("held out" + suffix, run.held, "reward", band, held_colour))
    return lines


def curves(run, baseline, gain):
    """All pictures of a run, the rewards of a baseline in grey, and what it earns above them."""
    earned = rewards(run)
    if baseline:
        earned += rewards(baseline, f", {baseline.name}", "#9aa0a6", "#80868e")
    pictures = [chart("Reward, with 95% bands", earned, from_zero=False)]
    if baseline:
        title = f"Reward above {baseline.name}, same scenarios"
        pictures.append(chart(title, [Line("difference", gain, "gain")], from_zero=False))
    for title, keys in itertools.groupby(CURVES, key=lambda curve: curve[0]):
        lines = [Line(label, run.steps, key) for _, label, key in keys]
        pictures.append(chart(title, lines, stacked=title == "Seconds of a step"))
    return pictures


# ---- transcripts ---------------------------------------------------------------------------------


def spans(sample, decode):
    """A sample as [text, log-prob] pairs: each sampled token; what was only read, with None."""
    found = []
    tokens = zip(sample["ids"], sample["mask"], sample["logprobs"])
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
    shown = ("turns", "stop", "final", "final_truncated", "reward", "advantage")
    kept = {key: record[key] for key in shown}
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


def decoder(folder):
    """`decode` of a run's tokenizer, or None, with a warning, where it has none."""
    try:
        return AutoTokenizer.from_pretrained(locate(folder)[0]).decode
    except (UserError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        missing = "no tokens in the transcripts, for lack of a checkpoint's tokenizer"
        print(f"{missing} ({reason})", file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """What the report shows."""

    baseline: str = option(
        "", "a second run folder: its rewards in grey, and the difference on scenarios of both"
    )
    scenarios: int = option(24, "scenarios whose transcripts can be read", low=0)
    out: str = option("", "the page (empty: RUN/report.html)")


def main(argv):
    """`python eval.py report RUN`. Returns the exit code."""
    if argv[:1] in (["-h"], ["--help"]):
        command_line(ReportSettings, argv, "eval.py report RUN")
    if not argv or argv[0].startswith("-"):
        raise UserError(
            "report: name the folder of a run first, such as: python eval.py report runs/debug-0"
        )
    folder = argv[0]
    settings = command_line(ReportSettings, argv[1:], "eval.py report RUN")
    run = read_run(folder)
    baseline = read_run(settings.baseline) if settings.baseline else None
    gain, late = gains(run, baseline) if baseline else ([], None)
    files = sorted(Path(folder, "eval").glob("*.json"))
    source = (DATA / "report.html.j2").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", source, re.DOTALL)[1]
    page = jinja2.Environment(autoescape=True).from_string(source)
    text = page.render(
        run=run,
        config=json.dumps(run.config, indent=1),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        baseline=baseline,
        late=late,
        curves=curves(run, baseline, gain),
        results={file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files},
        cells=cells,
        transcripts=transcripts(run, settings.scenarios, decoder(folder)),
    )
    out = Path(settings.out or Path(folder) / "report.html")
    write(out, text)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; open it in any browser")
    return 0
