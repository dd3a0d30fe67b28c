"""What the steps of a run were like: numbers for metrics.jsonl, lines and warnings for a person.

    dialogues.jsonl's records  ->  summary: a row  ->  metrics.jsonl, Terminal.show, Log.write

Everything here reads; nothing changes what a step computes. `reason_to_stop` may end a run.
"""

import collections
import dataclasses
import html
import importlib
import math
import re
import statistics
import textwrap
import time
from pathlib import Path

import torch

from cli import UserError
from measure import collapse, diversity


def summary(records):
    """What the dialogues of a step were like, from their lines of dialogues.jsonl."""
    rewards, cut_off, sampled = [], [], 0
    of_scenario = {record["scenario_id"]: [] for record in records}
    uniform = {record["group"]: True for record in records}  # no advantage but 0
    for record in records:
        if record["reward"] is not None:
            rewards.append(record["reward"])
            of_scenario[record["scenario_id"]].append(record["reward"])
        if record["advantage"]:
            uniform[record["group"]] = False
        cut_off += [turn["truncated"] for turn in record["turns"]]
        if record["final"] is not None:
            cut_off.append(record["final_truncated"])
        sampled += len(record["final_ids"])
        for stream in record["streams"]:
            sampled += sum(sum(sample["mask"]) for sample in stream["samples"])
    return {
        "reward_mean": mean(rewards),
        "reward_std": statistics.stdev(rewards) if len(rewards) > 1 else None,
        "reward_min": min(rewards, default=None),
        "reward_max": max(rewards, default=None),
        "agreed_rate": mean([record["agreed"] for record in records]),
        "rewards": {scenario: mean(earned) for scenario, earned in of_scenario.items()},
        "turns_mean": mean([len(record["turns"]) for record in records]),
        "missing_rewards": len(records) - len(rewards),
        "uniform_groups": mean(list(uniform.values())),
        "truncated_rate": mean(cut_off),
        "sampled_tokens": sampled,
        **diversity(records),
    }


def mean(values):
    """Their mean, None without any."""
    return statistics.fmean(values) if values else None


def judge_totals(parts):
    """The judge's counters, summed over the ranks' `parts`."""
    totals, missing = collections.Counter(), collections.Counter()
    for part in parts:
        missing.update(part["missing"])
        totals.update({f"judge_{key}": n for key, n in part.items() if key != "missing"})
    return {"judge_failures": missing.total(), "judge_missing": dict(missing), **totals}


def peak_memory_gb(device):
    """The most memory this process has held: on the GPU, or resident on a CPU (NaN: unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")  # getrusage would count what our parent held, too
    if status.exists() and "VmHWM:" in (text := status.read_text()):
        return int(text.split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    try:
        import resource  # Windows has none
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS counts in bytes


def printable(text):
    """Text from a model on one line, without control characters that could take over a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def whole_words(text, truncated):
    """A text for a person; one that met its limit of tokens without the word that it ended in."""
    text = printable(text)
    return re.sub(r" [\w'’-]{1,30}$", "", text) + " [cut off]" if truncated else text


def transcript(dialogue, indent=""):
    """One dialogue as wrapped lines of text: who said what, how it ended, the final, its score."""
    names = [persona["name"] for persona in dialogue.scenario.personas]
    lines = [f"dilemma: {dialogue.scenario.dilemma}"]
    for turn in dialogue.turns:
        lines.append(f"{names[turn.speaker]}: {whole_words(turn.text, turn.truncated)}")
    score = "no score" if dialogue.reward is None else f"{dialogue.reward:.2f}"
    final = "(none)"
    if dialogue.final is not None:
        final = whole_words(dialogue.final, dialogue.final_truncated)
    lines.append(f"joint solution ({dialogue.stop}, {score}): {final}")
    wrapper = textwrap.TextWrapper(
        120,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(wrapper.fill(printable(line)) for line in lines)


class Terminal:
    """Tells a person how the run goes, and the run when it has to stop."""

    def __init__(self, settings, done):
        self.settings, self.done, self.began = settings, done, time.time()
        self.judgeless, self.not_finite = 0, 0  # such steps in a row

    def show(self, row, rows, dialogue, scenarios):
        """Print a step: two lines, one of its dialogues, news of the epoch, warnings.

        rows: a function that gives the lines of metrics.jsonl. scenarios: how many are trained on.
        """
        step, steps = row["step"], self.settings.steps
        left = (time.time() - self.began) / (step - self.done) * (steps - step)
        print(step_lines(row, steps, left / 60))
        print(transcript(dialogue, indent="    "))
        if news := epoch_news(rows(), step, self.settings, scenarios):
            print(news)
        first = next(line for line in rows() if "heldout" not in line)
        dialogues = self.settings.scenarios_per_step * self.settings.group_size
        for warning in warnings(row, dialogues, first):
            print(f"    {warning}")
        print(end="", flush=True)

    def reason_to_stop(self, row, records):
        """Why the run cannot go on after this step; "" where it can."""
        mostly_missing = row["missing_rewards"] > len(records) / 2
        self.judgeless = self.judgeless + 1 if mostly_missing else 0
        self.not_finite = self.not_finite + 1 if row["skipped"] else 0
        if any("budget spent" in record["judge"]["failures"] for record in records):
            return "all calls of --judge-budget are used; raise it"
        if self.judgeless >= 5:
            return (
                f"more than half of the rewards were missing in {self.judgeless} steps in a row; "
                "look after the judge"
            )
        if self.not_finite >= 5:
            return f"{self.not_finite} steps in a row were not finite; lower --lr"
        return ""


def step_lines(row, steps, minutes_left):
    """Two readable lines on a step."""
    average, std, least, most = (
        text(row[f"reward_{key}"]) for key in ("mean", "std", "min", "max")
    )
    return (
        f"step {row['step']}/{steps}  reward {average} (std {std}, {least} to {most})"
        f"  agreed {row['agreed_rate']:.0%}  turns {row['turns_mean']:.1f}"
        f"  cut off {text(row['truncated_rate'], '.0%')}  judge failures {row['judge_failures']}\n"
        f"    loss {row['loss']:+.4f}  grad norm {row['grad_norm']:.2f}"
        f"  entropy {row['entropy']:.2f}  sampler gap {row['logprob_gap']:.4f}"
        f"  |  play {row['seconds_play']:.0f} s ({row['tokens_per_second']:.0f} tokens/s),"
        f" judge {row['seconds_judge']:.0f} s, learn {row['seconds_learn']:.0f} s"
        f"  |  {row['peak_memory_gb']:.1f} GB, {minutes_left:.0f} min left"
    )


def heldout_line(step, held):
    """A readable line on an evaluation."""
    average, low, high = (text(held[f"reward{end}"], ".3f") for end in ("", "_low", "_high"))
    return (
        f"    held-out reward after step {step}: {average} ({low} to {high}, "
        f"{held['n']} dialogues, {held['missing']} missing)"
    )


def text(number, form=".2f"):
    """A number for the terminal, "-" where it is missing."""
    return "-" if number is None else f"{number:{form}}"


def warnings(row, dialogues, first):
    """What a person should worry about in this step, a line each. first: the row of step 1."""
    missing, signs = row["missing_rewards"], collapse(row, first)
    often_cut = (row["truncated_rate"] or 0) > 0.5 and row["step"] % 10 == 1
    worries = {
        f"warning: possible collapse: {signs}": signs,
        f"warning: {missing} of {dialogues} rewards are missing: {row['judge_missing']}": (
            missing > dialogues / 2
        ),
        "warning: more than half of the texts were cut off at their limit; "
        "raise --turn-tokens or --final-tokens": often_cut,
        "no reward of this step differs from its group's others by more than --judge-noise: "
        "nothing was learnt": row["no_evidence"],
        "warning: the loss or a gradient is not finite; the step was skipped": row["skipped"],
    }
    return [worry for worry, there in worries.items() if there]


# ---- what training earned ------------------------------------------------------------------------


@dataclasses.dataclass
class Gain:
    """What an epoch earned beside the first one, on the scenarios that have a reward in both."""

    epoch: int
    before: float  # mean reward in the first epoch
    after: float  # and in this one
    error: float  # standard error of the difference, over scenarios
    scenarios: int
    higher: int  # how many of them earned more

    @property
    def difference(self):
        """What this epoch earned more."""
        return self.after - self.before

    def __str__(self):
        return (
            f"on the {self.scenarios} scenarios it trained on, the mean reward went from "
            f"{self.before:.2f} (first epoch) to {self.after:.2f} (epoch {self.epoch}), a "
            f"difference of {self.difference:+.2f} with a standard error of {self.error:.2f}; "
            f"{self.higher} of {self.scenarios} earned more"
        )


def gain_of(rows, epoch):
    """The Gain of an epoch by the lines of metrics.jsonl; None without two scenarios to compare.

    Scenarios differ by more than a few steps teach; a second visit to the same ones does not.
    """
    visits = collections.defaultdict(list)
    for row in rows:
        for scenario, earned in row.get("rewards", {}).items():
            visits[scenario].append(earned)
    first, now = [], []
    for earned in visits.values():
        if len(earned) >= epoch and None not in (earned[0], earned[epoch - 1]):
            first.append(earned[0])
            now.append(earned[epoch - 1])
    if len(first) < 2:
        return None
    gains = [after - before for before, after in zip(first, now)]
    error = statistics.stdev(gains) / len(gains) ** 0.5
    higher = sum(gain > 0 for gain in gains)
    return Gain(epoch, statistics.fmean(first), statistics.fmean(now), error, len(gains), higher)


def epoch_news(rows, step, settings, scenarios):
    """A line on the Gain of the epoch that ends with this step; else ""."""
    epoch, left = divmod(step * settings.scenarios_per_step, scenarios)
    if epoch < 2 or left >= settings.scenarios_per_step:
        return ""
    gain = gain_of(rows, epoch)
    return f"    so far: {gain}" if gain else ""


def closing_words(rows, step, settings, scenarios):
    """What a run of `step` steps earned from its first whole epoch to its last, in plain words."""
    epoch = step * settings.scenarios_per_step // scenarios
    gain = gain_of(rows, epoch) if epoch > 1 else None
    if gain is None:
        return (
            "whether training earned anything cannot be told: too few scenarios were scored in two "
            f"epochs ({scenarios} scenarios are an epoch, {settings.scenarios_per_step} a step)"
        )
    if abs(gain.difference) <= 2 * gain.error or gain.difference == 0:
        meaning = "no gain that can be told from chance"
    elif gain.difference > 0:
        meaning = "a gain, more than chance explains"
    else:
        meaning = "a loss, more than chance explains"
    return f"{meaning}: {gain}"


# ---- other programs that show a run --------------------------------------------------------------


def log_package(kind):
    """The module behind --log. Raises UserError where its package is not installed."""
    try:
        return importlib.import_module("torch.utils.tensorboard" if kind == "tensorboard" else kind)
    except ImportError as error:
        missing = f"--log {kind}: its package is missing; pip install {kind}, or leave --log away"
        raise UserError(missing) from error


def numbers(row, prefix=""):
    """{name: number} of a line of metrics.jsonl, those of a dict in it as "dict/name"."""
    found = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found[prefix + name] = value
    return found


class Log:
    """Shows a run in TensorBoard or W&B (a resumed one as a new one there) until `stack` closes."""

    def __init__(self, kind, folder, done, stack):
        self.package, self.wandb = log_package(kind), kind == "wandb"
        if not self.wandb:
            run = self.package.SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        else:
            try:
                run = self.package.init(project="negotiation", name=folder.name, dir=str(folder))
            except self.package.Error as error:  # no login, no network
                mend = f"wandb login, or WANDB_MODE=offline; then --resume {folder}"
                raise UserError(f"--log wandb: {str(error).splitlines()[0]}; {mend}") from error
        self.run = stack.enter_context(run)

    def write(self, row, text):
        """Show a line of metrics.jsonl, and a transcript: as it stands, no HTML, no Markdown."""
        step, found = row["step"], numbers(row)
        if self.wandb:
            page = {"transcript": self.package.Html(f"<pre>{html.escape(text)}</pre>")}
            return self.run.log({**found, **(page if text else {})}, step=step)
        for name, value in found.items():
            self.run.add_scalar(name, value, step)
        if text:
            self.run.add_text("transcript", textwrap.indent(text, "    "), step)  # a block of code
        self.run.flush()
