#!/usr/bin/env python3
"""How long one step takes on a fixed workload.

    scenarios x group dialogues, ends of turn suppressed -> selfplay.play -> train.learn -> medians

    python tests/bench.py [--scenarios 1] [--group 8] [--turns 4] [--turn-tokens 48]
    python tests/bench.py --judge-latency 2     # how much a slow judge adds, 8 calls in flight
    python tests/bench.py --profile             # the costliest operations

Every turn has exactly --turn-tokens tokens. Printed are the medians of --repeats steps after one to
warm up.
"""

import concurrent.futures
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import chat
import dataset
import grpo
import policy
import reward
import selfplay
import train
from cli import command_line, option, run_cli
from progress import peak_memory_gb
from settings import Settings

PLACES = ["A mid-sized town", "A coastal city", "A mountain village", "A desert district"]
DILEMMA = (
    " has one reservoir. A drought has begun. The farming cooperative needs irrigation water or it "
    "loses the season; the hospital and households need a reserve for the summer. What should the "
    "council decide?"
)
FARM = "You lead the farming cooperative. You value livelihoods, food and the dignity of work."
HOSPITAL = "You direct the hospital. You value safety, health and protecting the vulnerable."
PERSONAS = ({"name": "Rosa", "creed": FARM}, {"name": "Dr. Chen", "creed": HOSPITAL})


@dataclasses.dataclass(frozen=True)
class Bench:
    """The workload."""

    model: str = option("smollm2-135m", "smollm2-135m, a folder, or a Hugging Face id")
    dtype: str = option("auto", "of the computation", choices=("auto", "fp32", "bf16"))
    scenarios: int = option(1, "scenarios, each with other dilemma text", low=1)
    group: int = option(8, "dialogues of a scenario", low=2)
    turns: int = option(4, "turns", low=1)
    turn_tokens: int = option(48, "tokens of a turn", low=2)
    final_tokens: int = option(64, "tokens of the final completion", low=2)
    micro_tokens: int = option(
        Settings.micro_tokens, "tokens of one forward and backward pass (0: by device)", low=0
    )
    repeats: int = option(3, "steps that are timed", low=1)
    judge_latency: float = option(0.0, "seconds that each judge call takes, 8 in flight", low=0)
    json: str = option("", "a file to add the results to, as one line of JSON")
    profile: bool = option(False, "print the costliest operations of a step")


class SlowJudge:
    """A judge that answers any score after `latency` seconds, 8 calls at once."""

    def __init__(self, latency):
        self.latency = latency
        self.pool = concurrent.futures.ThreadPoolExecutor(8)

    def score(self, dilemma, personas, turns, final):
        """A Future of a verdict."""
        return self.pool.submit(self.answer, final)

    def answer(self, final):
        """The verdict, in time."""
        time.sleep(self.latency)
        return reward.Verdict(float(len(final) % 6))


# ---- the workload --------------------------------------------------------------------------------


@dataclasses.dataclass
class Step:
    """What one step took, in seconds, and what it was about."""

    play: float
    learn: float
    waited: float  # for the judge, part of learn
    trained_tokens: int

    @property
    def whole(self):
        return self.play + self.learn


class Workload:
    """A policy, its learner and the scenarios, ready to make steps."""

    def __init__(self, bench):
        self.bench = bench
        self.settings = settings_of(bench)
        self.world = policy.start_world()
        made = policy.build(self.settings, self.world)
        self.model = made.model
        self.voice = chat.Voice(made.player, made.tokenizer)
        self.voice.chat.ends = set()  # nothing ends a turn but its limit
        self.learner = grpo.Learner(made.model, made.optimizer, self.settings, made.reference)

    def groups(self, number):
        """The empty dialogues of step `number`."""
        groups = []
        for g in range(self.bench.scenarios):
            scenario = dataset.Scenario(f"bench-{g}", "", PLACES[g % 4] + DILEMMA, PERSONAS)
            members = range(self.bench.group)
            groups.append([selfplay.Dialogue(scenario, number, g, m) for m in members])
        return groups

    def step(self, number, judge):
        """Play and learn once."""
        groups = self.groups(number)
        dialogues = sum(groups, [])
        start = time.perf_counter()
        selfplay.play((self.voice, self.voice), dialogues, self.settings, judge, seed=0)
        middle = time.perf_counter()
        means, waited = train.learn(groups, self.learner, self.settings, self.world)
        end = time.perf_counter()
        return Step(middle - start, end - middle, waited, means["trained_tokens"])

    def steps(self, judge):
        """--repeats steps, after one to warm up."""
        return [self.step(number, judge) for number in range(self.bench.repeats + 1)][1:]


def settings_of(bench):
    """The train.py settings of a workload."""
    return Settings(
        model=bench.model,
        dtype=bench.dtype,
        agreement="none",
        max_turns=bench.turns,
        turn_tokens=bench.turn_tokens,
        final_tokens=bench.final_tokens,
        temperature=1.0,
        top_p=1.0,
        final_temperature=1.0,
        final_top_p=1.0,
        group_size=bench.group,
        scenarios_per_step=bench.scenarios,
        micro_tokens=bench.micro_tokens,
        lr=1e-6,
    )


def median(steps, what):
    """The median of one number of the steps."""
    return statistics.median(getattr(step, what) for step in steps)


# ---- what is printed -----------------------------------------------------------------------------


def results_of(work, steps):
    """What the steps took, {name: number}, beside what they were measured on."""
    device, bench = work.world.device, work.bench
    play = median(steps, "play")
    sampled = bench.scenarios * bench.group * (bench.turns * bench.turn_tokens + bench.final_tokens)
    return {
        "what": f"bench {bench.scenarios} x {bench.group}",
        "model": bench.model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "play_s": play,
        "learn_s": median(steps, "learn"),
        "step_s": median(steps, "whole"),
        "sampled_tokens_per_s": sampled / play,
        "peak_memory_gb": peak_memory_gb(device),
    }


def show(row, work, steps):
    """Print the lines of play, learn and step."""
    trained = steps[-1].trained_tokens / row["learn_s"]
    dtype = next(work.model.parameters()).dtype
    print(f"play   {row['play_s']:6.1f} s  {row['sampled_tokens_per_s']:6.1f} sampled tokens/s")
    print(f"learn  {row['learn_s']:6.1f} s  {trained:6.1f} trained tokens/s")
    print(
        f"step   {row['step_s']:6.1f} s  peak memory {row['peak_memory_gb']:.1f} GB   "
        f"{dtype}, {torch.get_num_threads()} threads, median of {work.bench.repeats}"
    )


def add_line(path, row):
    """Add a line of JSON to the file of --json."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def show_slow_judge(work, steps):
    """The line of a step with a slow judge."""
    latency = work.bench.judge_latency
    slow = work.steps(SlowJudge(latency))
    whole, waited = median(slow, "whole"), median(slow, "waited")
    more = whole / median(steps, "whole") - 1
    print(
        f"judge  {whole:6.1f} s  a step with {latency:g} s per call: {more:+.1%}, "
        f"of which {waited:.1f} s waiting"
    )


def show_profile(work):
    """A table of the costliest operations of a step."""
    with torch.profiler.profile() as profile:
        work.step(99, SlowJudge(0.0))
    by_time = f"self_{work.world.device.type}_time_total"
    averages = profile.key_averages()
    print(averages.table(sort_by=by_time, row_limit=20, max_name_column_width=40))


def main(argv=None):
    """Time --repeats steps and print the medians."""
    bench = command_line(Bench, argv, prog="tests/bench.py")
    work = Workload(bench)
    steps = work.steps(SlowJudge(0.0))
    row = results_of(work, steps)
    show(row, work, steps)
    if bench.json:
        add_line(bench.json, row)
    if bench.judge_latency:
        show_slow_judge(work, steps)
    if bench.profile:
        show_profile(work)


if __name__ == "__main__":
    run_cli(main)
