#!/usr/bin/env python3
"""How long one step takes, on a fixed workload: every turn has exactly --turn-tokens tokens, ends of turn are suppressed.

    python tests/bench.py [--scenarios 4] [--group 8] [--turns 4] [--turn-tokens 48] [--final-tokens 64] [--repeats 3]
    python tests/bench.py --judge-latency 2          # how much a slow judge adds to the step, 8 calls in flight
    python tests/bench.py --profile                  # where the time goes

Prints the medians of --repeats steps after one to warm up. `floor`: the seconds that the step's arithmetic and weight reads
would take at this machine's own matrix rate and read bandwidth, both measured here; the step's share of it is floor / step.
"""

import concurrent.futures
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data_gen  # noqa: E402
import grpo  # noqa: E402
import model as lm  # noqa: E402
import reward  # noqa: E402
import selfplay  # noqa: E402
import train  # noqa: E402
from policy import build, start_world  # noqa: E402
from progress import peak_memory_gb  # noqa: E402
from settings import Settings  # noqa: E402
from cli import command_line, option, run_cli  # noqa: E402

PLACES = ["A mid-sized town", "A coastal city", "A mountain village", "A desert district"]
DILEMMA = (
    " has one reservoir. A drought has begun. The farming cooperative needs irrigation water or it loses the season; "
    "the hospital and households need a reserve for the summer. What should the council decide?"
)
PERSONAS = (
    {
        "name": "Rosa",
        "creed": "You lead the farming cooperative. You value livelihoods, food and the dignity of work.",
    },
    {
        "name": "Dr. Chen",
        "creed": "You direct the hospital. You value safety, health and protecting the vulnerable.",
    },
)


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
    context_turns: int = option(0, "turns that an agent sees (0: all)", low=0)
    micro_tokens: int = option(
        Settings.micro_tokens, "tokens in one forward and backward pass", low=1
    )
    repeats: int = option(3, "steps that are timed", low=1)
    judge_latency: float = option(0.0, "seconds that each judge call takes, 8 in flight", low=0)
    profile: bool = option(False, "print the costliest operations of a step")


class SlowJudge:
    """A judge that answers any score after `latency` seconds, 8 calls at once."""

    def __init__(self, latency):
        self.latency, self.pool = latency, concurrent.futures.ThreadPoolExecutor(8)

    def score(self, dilemma, personas, turns, final):
        """A Future of a verdict."""

        def answer():
            time.sleep(self.latency)
            return reward.Verdict(float(len(final) % 6))

        return self.pool.submit(answer)


def rates(dtype, device):
    """The device's matrix rate in FLOP/s in `dtype`, and its read bandwidth in bytes/s."""
    n = 2048 if device.type == "cpu" else 8192
    a, block = torch.randn(n, n, device=device).to(dtype), torch.randn(1 << 26, device=device)

    def seconds(work):
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        times = []
        for _ in range(6):
            wait()
            start = time.perf_counter()
            work()
            wait()
            times.append(time.perf_counter() - start)
        return min(times)

    return 2 * n**3 / seconds(lambda: a @ a), block.numel() * 4 / seconds(block.sum)


def floor_seconds(model, dialogues, packed, flops, bandwidth, size):
    """(play, learn) seconds that arithmetic and reading the weights, `size` bytes each, once per decoded token would take."""
    head = model.get_output_embeddings().weight
    body = (
        sum(p.numel() for p in lm.inner(model).parameters())
        - lm.inner(model).get_input_embeddings().weight.numel()
    )
    sampled = sum(len(t.ids) for d in dialogues for t in d.turns) + sum(
        sum(d.final_sample.mask) for d in dialogues
    )
    trees = [tree for group in packed for tree, _ in group]
    read = sum(tree.tokens for tree in trees)
    reads = sampled / len(dialogues) * (body + head.numel()) * size / bandwidth
    play = max(reads, (2 * body * (read + sampled / 3) + 2 * head.numel() * sampled) / flops)
    trained = sum(len(row.wanted) for group in packed for _, rows in group for row in rows)
    return play, (
        6 * body * read + 8 * head.numel() * trained
    ) / flops  # the projection is computed once more in backward


def main(argv=None):
    """Time --repeats steps and print the medians."""
    b = command_line(Bench, argv, prog="tests/bench.py")
    settings = Settings(
        model=b.model,
        dtype=b.dtype,
        agreement="none",
        max_turns=b.turns,
        turn_tokens=b.turn_tokens,
        final_tokens=b.final_tokens,
        context_turns=b.context_turns,
        temperature=1.0,
        final_temperature=1.0,
        group_size=b.group,
        scenarios_per_step=b.scenarios,
        micro_tokens=b.micro_tokens,
        lr=1e-6,
    )
    world = start_world()
    model, player, tokenizer, optimizer, reference = build(settings, world)
    voice = selfplay.voice(player, tokenizer)
    voice.chat.ends = set()  # nothing ends a turn but its limit
    learner = grpo.Learner(model, optimizer, settings, reference)
    scenarios = [
        data_gen.Scenario(f"bench-{s}", "", PLACES[s % 4] + DILEMMA, PERSONAS)
        for s in range(b.scenarios)
    ]

    def step(number, judge):
        groups = [
            [selfplay.Dialogue(s, number, g, m) for m in range(b.group)]
            for g, s in enumerate(scenarios)
        ]
        flat = [d for group in groups for d in group]
        start = time.perf_counter()
        selfplay.play((voice, voice), flat, settings, judge, seed=0)
        middle = time.perf_counter()
        means, waited = train.learn(groups, learner, settings, world)
        return (
            middle - start,
            time.perf_counter() - middle,
            waited,
            means["trained_tokens"],
            flat,
            groups,
        )

    def timed(judge):
        runs = [step(n, judge) for n in range(b.repeats + 1)][1:]
        play, learn, waited = (statistics.median(r[i] for r in runs) for i in range(3))
        return play, learn, waited, statistics.median(r[0] + r[1] for r in runs), runs[-1]

    play, learn, _, whole, last = timed(SlowJudge(0.0))
    sampled = b.scenarios * b.group * (b.turns * b.turn_tokens + b.final_tokens)
    dtype = next(model.parameters()).dtype
    print(f"play   {play:6.1f} s  {sampled / play:6.1f} sampled tokens/s")
    print(f"learn  {learn:6.1f} s  {last[3] / learn:6.1f} trained tokens/s")
    print(
        f"step   {whole:6.1f} s  peak memory {peak_memory_gb(world.device):.1f} GB   {dtype}, {torch.get_num_threads()} threads, median of {b.repeats}"
    )
    flops, bandwidth = rates(dtype, world.device)
    packed = [
        grpo.pack(group, "dialogue", 1 << 40) for group in last[5]
    ]  # every token of every stream, once
    low = floor_seconds(model, last[4], packed, flops, bandwidth, dtype.itemsize)
    print(
        f"floor  {sum(low):6.1f} s  (play {low[0]:.1f}, learn {low[1]:.1f}): {sum(low) / whole:.0%} of the step; {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s"
    )
    if b.judge_latency:
        slow = timed(SlowJudge(b.judge_latency))
        print(
            f"judge  {slow[3]:6.1f} s  a step with {b.judge_latency:g} s per call: {slow[3] / whole - 1:+.1%}, of which {slow[2]:.1f} s waiting"
        )
    if b.profile:
        with torch.profiler.profile() as profile:
            step(99, SlowJudge(0.0))
        print(
            profile.key_averages().table(
                sort_by=f"self_{world.device.type}_time_total",
                row_limit=20,
                max_name_column_width=40,
            )
        )


if __name__ == "__main__":
    run_cli(main)
