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
import itertools
import statistics
import time

import torch
import workload

import attention
import chat
import dataset
import grpo
import model as lm
import plan
import policy
import reward
import selfplay
import train
from cli import UserError, command_line, option, run_cli
from progress import peak_memory_gb
from settings import Settings


@dataclasses.dataclass(frozen=True)
class Bench(workload.Flags):
    """What our own program adds."""

    model: str = option("smollm2-135m", "smollm2-135m, a folder, or a Hugging Face id")
    micro_tokens: int = option(
        Settings.micro_tokens, "tokens of one forward and backward pass (0: by device)", low=0
    )
    lora_rank: int = option(0, "train adapters of this rank (0: the whole model)", low=0)
    judge_latency: float = option(0.0, "seconds that each judge call takes, 8 in flight", low=0)
    profile: bool = option(False, "print the costliest operations of a step")


class SlowJudge:
    """A judge that answers after `latency` seconds, 8 calls at once; its scores differ in turn."""

    def __init__(self, latency):
        self.latency = latency
        self.pool = concurrent.futures.ThreadPoolExecutor(8)
        self.scores = itertools.cycle([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])

    def score(self, dilemma, personas, turns, final):
        """A Future of a verdict."""
        return self.pool.submit(self.answer, next(self.scores))

    def answer(self, score):
        """The verdict, in time."""
        time.sleep(self.latency)
        return reward.Verdict(score)


# ---- steps ---------------------------------------------------------------------------------------


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
        for g, scenario in enumerate(scenarios_of(self.bench)):
            members = range(self.bench.group)
            groups.append([selfplay.Dialogue(scenario, number, g, m) for m in members])
        return groups

    def step(self, number, judge):
        """Play and learn once. Raises UserError where the model's context cuts a dialogue short."""
        groups = self.groups(number)
        dialogues = sum(groups, [])
        start = workload.now(self.world.device)
        selfplay.play((self.voice, self.voice), dialogues, self.settings, judge, seed=0)
        middle = workload.now(self.world.device)
        if any(dialogue.stop == "context" for dialogue in dialogues):
            flags = "--turns, --turn-tokens, --final-tokens"
            limit = attention.context_limit(self.voice.model)
            raise UserError(f"{flags}: more than the {limit} tokens of --model; lower one")
        means, waited = train.learn(groups, self.learner, self.settings, self.world)
        end = workload.now(self.world.device)
        return Step(middle - start, end - middle, waited, means["trained_tokens"])

    def steps(self, judge):
        """--repeats steps, after one to warm up."""
        return [self.step(number, judge) for number in range(self.bench.repeats + 1)][1:]


def scenarios_of(bench):
    """The scenarios of a workload."""
    texts = enumerate(workload.dilemmas(bench))
    return [dataset.Scenario(f"bench-{g}", "", text, workload.PERSONAS) for g, text in texts]


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
        lora_rank=bench.lora_rank,
        lr=1e-6,
    )


def median(steps, what):
    """The median of one number of the steps."""
    return statistics.median(getattr(step, what) for step in steps)


# ---- what is printed -----------------------------------------------------------------------------


def results_of(work, steps):
    """One line of results; on a card what --plan says as well."""
    device = work.world.device
    seconds = [median(steps, what) for what in ("play", "learn", "whole")]
    row = workload.results(work.bench, "ours", device, seconds, peak_memory_gb(device))
    if device.type == "cuda":
        row["plan_gb"] = planned_gb(work.bench)
    return row


def planned_gb(bench):
    """GB that `train.py --plan` reckons with for this workload on one card."""
    _, config, tokenizer = lm.find(bench.model)
    prompt = plan.prompt_tokens(tokenizer, scenarios_of(bench))
    dtype = lm.compute_dtype(bench.dtype, lm.own_device())
    return plan.memory_plan(config, settings_of(bench), dtype, prompt)["peak"] / 1e9


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
    workload.check_file(bench.json)
    work = Workload(bench)
    steps = work.steps(SlowJudge(0.0))
    row = results_of(work, steps)
    dtype = next(work.model.parameters()).dtype
    about = f"{dtype}, {torch.get_num_threads()} threads, median of {bench.repeats}"
    workload.show(row, steps[-1].trained_tokens, about)
    if bench.json:
        workload.add_line(bench.json, row)
    if bench.judge_latency:
        show_slow_judge(work, steps)
    if bench.profile:
        show_profile(work)


if __name__ == "__main__":
    run_cli(main)
