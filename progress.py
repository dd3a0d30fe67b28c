"""What the steps of a run were like: numbers for metrics.jsonl, lines and warnings for a person.

    dialogues.jsonl's records  ->  summary: a row  ->  metrics.jsonl, show, Log.write

Everything here reads; nothing changes what a step computes. `reason_to_stop` may end a run.
"""

import collections
import html
import importlib
import math
import re
import statistics
import textwrap
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
    status = Path("/proc/self/status")  # of Linux; getrusage would count what our parent held, too
    held = re.search(r"VmHWM:\s*(\d+)", status.read_text() if status.exists() else "")
    return int(held[1]) * 1024 / 1e9 if held else math.nan


def printable(text):
    """Text from a model on one line, without control characters that could take over a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def transcript(dialogue, indent=""):
    """One dialogue as wrapped lines of text: who said what, how it ended, the final, its score."""
    names = [persona["name"] for persona in dialogue.scenario.personas]
    lines = [f"dilemma: {dialogue.scenario.dilemma}"]
    for turn in dialogue.turns:
        lines.append(f"{names[turn.speaker]}: {turn.text}{' [cut off]' * turn.truncated}")
    score = "no score" if dialogue.reward is None else f"{dialogue.reward:.2f}"
    final = "(none)" if dialogue.final is None else dialogue.final
    final += " [cut off]" * dialogue.final_truncated
    lines.append(f"joint solution ({dialogue.stop}, {score}): {final}")
    wrapper = textwrap.TextWrapper(
        120,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(wrapper.fill(printable(line)) for line in lines)


def show(row, rows, dialogue, settings):
    """Print a step: two lines, one of its dialogues, warnings. rows: of all steps so far."""
    left = settings.steps - row["step"]
    minutes_left = statistics.fmean(row["seconds_step"] for row in rows) / 60 * left
    print(step_lines(row, settings.steps, minutes_left))
    print(transcript(dialogue, indent="    "))
    for warning in warnings(row, settings.scenarios_per_step * settings.group_size, rows[0]):
        print(f"    {warning}")
    print(end="", flush=True)


def reason_to_stop(rows, records):
    """Why a run cannot go on after the newest of its steps, whose records these are; else ""."""
    if any("budget spent" in record["judge"]["failures"] for record in records):
        return "all calls of --judge-budget are used; raise it"
    last = rows[-5:]
    if len(last) < 5:
        return ""
    if all(row["missing_rewards"] > len(records) / 2 for row in last):
        return (
            "more than half of the rewards were missing in 5 steps in a row; look after the judge"
        )
    if all(row["skipped"] for row in last):
        return "5 steps in a row were not finite; lower --lr"
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


def rewards_of_epochs(rows, epoch):
    """(rewards of the first epoch, of this one) on the scenarios that have one in both: two lists.

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
    return first, now


def closing_words(rows, step, per_step, scenarios):
    """What a run of `step` steps earned from its first whole epoch to its last, in plain words.

    per_step, scenarios: how many a step plays, and how many are an epoch.
    """
    epoch = step * per_step // scenarios
    first, now = rewards_of_epochs(rows, epoch)
    if epoch < 2 or len(first) < 2:
        return (
            "whether training earned anything cannot be told: too few scenarios were scored in two "
            f"epochs ({scenarios} scenarios are an epoch, {per_step} a step)"
        )
    gains = [after - before for before, after in zip(first, now)]
    difference = mean(gains)
    error = statistics.stdev(gains) / len(gains) ** 0.5  # over scenarios
    if abs(difference) <= 2 * error or difference == 0:
        meaning = "no gain that can be told from chance"
    elif difference > 0:
        meaning = "a gain, more than chance explains"
    else:
        meaning = "a loss, more than chance explains"
    return (
        f"{meaning}: on the {len(gains)} scenarios it trained on, the mean reward went from "
        f"{mean(first):.2f} (first epoch) to {mean(now):.2f} (epoch {epoch}), a difference of "
        f"{difference:+.2f} with a standard error of {error:.2f}; "
        f"{sum(gain > 0 for gain in gains)} of {len(gains)} earned more"
    )


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
