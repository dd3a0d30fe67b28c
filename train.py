"""Teach a language model to negotiate: play, judge, advantages, loss, step, over and over.

    scenarios -> deal -> selfplay.play, the judge reads along -> advantages, loss, step -> player

    python train.py                                            # the debug recipe, on a laptop
    python train.py --model Qwen/Qwen3-0.6B --judge-url http://127.0.0.1:8000/v1         # 1 GPU
    torchrun --nproc_per_node=8 train.py --recipe paper --model Qwen/Qwen3-14B --fsdp \
        --judge-url http://judge:8000/v1 --judge-model NAME                              # 8 GPUs

What differs from the paper (arXiv 2603.10476); `--recipe paper` takes back 3 to 5:

1. All weights are trained, in fp32 (or adapters: --lora-rank); the paper: 4-bit QLoRA.
2. The default model is tiny, so it has imitated written negotiations first (`imitate`).
3. Agents see the whole dialogue and have 3 turns; the paper: the last two turns, and 7.
4. Without an agreement they write a solution all the same; the paper: none, and reward 0.
5. Groups of 6, lr 2e-5, no nucleus, solutions at T 0.5; the paper: 8, 5e-6, top-p 0.95, T 0.1.
6. A small embedded judge reads; the paper: a large model (here: --judge-url).
7. Rewards no further apart than the judge wobbles are equal; no difference, no step.

Left out: random state. What is drawn depends on (seed, step, scenario, member, turn) alone, never
on the rank, the clock or the order in which the judge answers.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data_gen
import grpo
import model as lm
import plan
import progress
import reward
import selfplay
from checkpoint import (
    append,
    begin,
    best_step,
    claim,
    load_trainer,
    open_run,
    save_checkpoint,
    whole_lines,
)
from cli import UserError, run_cli
from client import BudgetSpent
from eval import heldout, heldout_row
from policy import World, build, start_world
from progress import peak_memory_gb
from settings import RECIPES, Settings, check_contents, read_settings

__all__ = ["RECIPES", "Settings", "World", "main"]  # for whoever imports train

# ---- scenarios -----------------------------------------------------------------------------------


def divide(settings):
    """(scenarios to train on, scenarios that --eval-every holds out).

    Raises UserError when none would be left to train on.
    """
    scenarios = data_gen.load_scenarios(settings.scenarios or None, settings.seed)
    n = settings.eval_scenarios if settings.eval_every else 0
    if n >= len(scenarios):
        raise UserError(
            f"--eval-scenarios {n}: there are only {len(scenarios)} scenarios; "
            "keep some for training"
        )
    held_out = data_gen.spread(scenarios, n) if n else []
    train_on = [scenario for scenario in scenarios if scenario not in held_out]
    if settings.epoch_steps:
        order = np.random.default_rng([settings.seed, 77]).permutation(len(train_on))
        drawn = order[: settings.epoch_steps * settings.scenarios_per_step]
        train_on = [train_on[i] for i in sorted(drawn)]
    return train_on, held_out


def deal(scenarios, settings, step, world):
    """This rank's groups of a step: lists of empty Dialogues, whole groups only.

    Scenarios come in the order of a permutation per epoch, a function of seed and step alone.
    """
    drawn, size = [], settings.group_size
    for group in range(settings.scenarios_per_step):
        epoch, at = divmod((step - 1) * settings.scenarios_per_step + group, len(scenarios))
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(scenarios))
        drawn.append(order[at])
    groups = []
    for group in range(world.rank, len(drawn), world.size):
        scenario = scenarios[drawn[group]]
        # one that comes twice in a step goes on counting: other members draw other tokens
        first = drawn[:group].count(drawn[group]) * size
        members = range(first, first + size)
        groups.append([selfplay.Dialogue(scenario, step, group, member) for member in members])
    return groups


# ---- advantages, loss, optimizer step ------------------------------------------------------------


def settle(group, settings):
    """Wait for the judge's verdicts on a group and turn its rewards into advantages.

    A missing reward is None, and so is its advantage.
    """
    for dialogue in group:
        if dialogue.verdict is not None:
            spent = isinstance(dialogue.verdict.exception(), BudgetSpent)
            missing = reward.Verdict(None, "budget spent")
            verdict = missing if spent else dialogue.verdict.result()
            failures = [verdict.reason] if verdict.reason else []
            dialogue.reward = verdict.value
            dialogue.judge = {"raw": verdict.raw, "failures": failures}
    rewards = [math.nan if dialogue.reward is None else dialogue.reward for dialogue in group]
    advantages = grpo.group_advantages(
        torch.tensor([rewards], dtype=torch.float64),  # (1, G)
        settings.advantage_scale,
        noise=settings.judge_noise,
    )
    for dialogue, advantage in zip(group, advantages[0].tolist()):
        dialogue.advantage = None if dialogue.reward is None else advantage


def learn(groups, learner, settings, world):
    """Settle each group as its verdicts come and take its gradient while the judge reads the next.

    Returns (means of the last update, seconds spent waiting for the judge).
    """
    lm.release_memory()
    packed = [grpo.pack(group, settings.train_tokens, settings.micro_tokens) for group in groups]
    passes = sum(len(trees) for trees in packed)
    idle = max(world.gather(passes)) - passes  # every rank makes as many as the busiest
    waited, updates = 0.0, []
    for update in range(settings.updates_per_rollout):
        for group, trees in zip(groups, packed):
            if update == 0:
                start = time.perf_counter()
                settle(group, settings)
                waited += time.perf_counter() - start
            backward(learner, trees)
        backward(learner, [], idle)
        updates.append(learner.step())
    lm.release_memory()
    skipped = any(means["skipped"] for means in updates)
    gap = updates[0]["logprob_gap"]  # later the policy itself has moved
    return {**updates[-1], "skipped": skipped, "logprob_gap": gap}, waited


def backward(learner, trees, idle=0):
    """Add the gradients of these trees, then make `idle` passes without one."""
    for tree, rows in trees:
        learner.backward(tree, rows)
    for _ in range(idle):
        learner.idle()


# ---- how a run ends ------------------------------------------------------------------------------


class Ended(BaseException):
    """The run ends before its last step, on all ranks; no error, so nothing else may catch it."""

    def __init__(self, code, reason):
        super().__init__(reason)
        self.code, self.reason = code, reason


class Stopped(KeyboardInterrupt):
    """The dialogues being played are given up."""


class Stop:
    """SIGINT and SIGTERM end the run with a checkpoint, a second one at once.

    What is being played is given up, what is being learnt is finished. torchrun passes on the
    Ctrl-C that every rank has seen already: what comes within 2 seconds is taken for that.
    """

    def __init__(self, world):
        self.since, self.playing, self.world = None, False, world
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        if self.since is None:
            self.since = time.monotonic()
            if self.world.rank == 0:
                text = "\nstopping, with a checkpoint of the last whole step (once more: at once)\n"
                os.write(2, text.encode())
        elif self.world.size == 1 or time.monotonic() - self.since > 2:
            raise KeyboardInterrupt
        if self.playing:
            self.playing = False
            raise Stopped

    @property
    def verdict(self):
        """(exit code, reason); code 0: go on."""
        return (0, "done") if self.since is None else (130, "interrupted")

    def run(self, play, *arguments, **more):
        """play(...), given up at a signal, and None where one came before."""
        try:
            self.playing = True
            return play(*arguments, **more) if self.since is None else None
        except Stopped:
            return None
        finally:
            self.playing = False


# ---- the run -------------------------------------------------------------------------------------


class Run:
    """What lives as long as the run: folder, policy, learner; in self-play judge and scenarios."""

    def __init__(self, settings, world, stack):
        if settings.scenarios_per_step % world.size:
            raise UserError(
                f"--scenarios-per-step {settings.scenarios_per_step}: {world.size} ranks need a "
                f"multiple of {world.size}"
            )
        self.settings, self.world, self.stack = settings, world, stack
        self.files = check_contents(settings)
        if settings.resume and world.rank == 0:
            claim(Path(settings.resume), stack)
        found = open_run(settings) if world.rank == 0 else None
        self.folder, checkpoint = world.broadcast(found)
        self.policy = build(settings, world, None if settings.lora_rank else checkpoint)
        self.done, self.saved = 0, None  # the last whole step, the last one with a checkpoint
        if checkpoint:
            self.done = self.saved = load_trainer(checkpoint, self.policy.optimizer)
        self.policy.update_player()
        self.learner = grpo.Learner(
            self.policy.model, self.policy.optimizer, settings, self.policy.reference
        )

    def start(self):
        """Divide the scenarios, find the judge, make the folder this run's own."""
        settings, world, player = self.settings, self.world, self.policy.player
        self.scenarios, self.held_out = divide(settings)
        self.voice = selfplay.voice(player, self.policy.tokenizer)
        limit = lm.context_limit(player)
        if settings.final_tokens + selfplay.room(settings) >= limit:
            raise UserError(
                f"--turn-tokens, --final-tokens: {settings.model} holds {limit} tokens in all; "
                "use fewer"
            )
        self.judge = self.stack.enter_context(self.open_judge())
        if settings.agreement == "judge" and settings.max_turns and not self.judge.can("agreed"):
            raise UserError(
                f"--agreement judge: {self.judge.model} is a reward model and knows scores only; "
                "add --agreement marker, or none"
            )
        found = {"judge_model": self.judge.model, "judge_mode": self.judge.mode}
        self.settings = dataclasses.replace(settings, **found)  # a resumed run reads alike
        self.judge.take_stats()  # the first question is of no step
        self.begin()
        again = " over and over (--epoch-steps 0: all)" if settings.epoch_steps else ""
        self.say(
            f"{settings.model} on {world.size} x {world.device}, {next(player.parameters()).dtype}"
            f"; {len(self.scenarios)} scenarios{again}, {settings.scenarios_per_step} x "
            f"{settings.group_size} dialogues a step; results in {self.folder}/"
        )

    def open_judge(self):
        """The judge, with this rank's share of what earlier steps left of --judge-budget."""
        settings, world = self.settings, self.world
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        if not settings.judge_url and world.size > on_this_machine:
            raise UserError(
                "--judge-url: the embedded judge serves one machine only; "
                "name a server that all nodes reach"
            )
        left = settings.judge_budget
        if left:
            left -= sum(row.get("heldout", row).get("judge_calls", 0) for row in self.rows())
            left = max(1, left // world.size)
        asking = dataclasses.replace(settings, judge_budget=left)
        return reward.open_judge(asking, world.rank, world.broadcast)

    def begin(self):
        """Write config.json; from now on signals end the run in order."""
        if self.world.rank == 0:
            begin(self.folder, self.settings, self.files, self.policy.model, self.stack)
        self.stop = Stop(self.world)
        self.terminal = progress.Terminal(self.settings, self.done)

    def rows(self):
        """The lines of metrics.jsonl so far."""
        return whole_lines(self.folder / "metrics.jsonl")

    def append(self, name, records):
        """Append records to a file of the run's folder, on rank 0."""
        if self.world.rank == 0:
            append(self.folder / name, records)

    def say(self, text):
        """Print on rank 0."""
        if self.world.rank == 0:
            print(text, flush=True)

    def agree(self, code, reason):
        """Raise Ended on all ranks where one of them has an exit code."""
        code, reason = max(self.world.gather((code, reason)))
        if code:
            raise Ended(code, reason)

    def unless_stopped(self, play, *arguments, **more):
        """play(...); raises Ended on all ranks where a signal or a spent budget ends it on one."""
        result = None
        try:
            result = self.stop.run(play, *arguments, **more)
            ended = self.stop.verdict
        except BudgetSpent as spent:
            ended = (3, f"stopped: {spent}; raise it, then --resume")
        self.agree(*ended)
        return result

    def gather_records(self, records, key):
        """The records of all ranks, sorted by `key` and member."""
        everyone = itertools.chain(*self.world.gather(records))
        return sorted(everyone, key=lambda record: (record[key], record["member"]))

    def play(self, dialogues):
        """Play this rank's dialogues to their ends; the judge reads each that is finished."""
        start = time.perf_counter()
        title, hidden = f"step {self.done + 1}: dialogues", self.world.rank > 0
        self.judge.start_batch()
        with tqdm(total=len(dialogues), desc=title, leave=False, disable=hidden) as bar:
            self.unless_stopped(
                selfplay.play,
                (self.voice, self.voice),
                dialogues,
                self.settings,
                self.judge,
                self.settings.seed,
                on_done=lambda dialogue: bar.update(),
            )
        return {"seconds_play": time.perf_counter() - start}

    def learn(self, groups):
        """Rewards, advantages, loss, one optimizer step; then the player gets the new weights."""
        start = time.perf_counter()
        means, waited = learn(groups, self.learner, self.settings, self.world)
        self.policy.update_player()
        seconds = time.perf_counter() - start - waited
        return {**means, "seconds_judge": waited, "seconds_learn": seconds}

    def record(self, step, dialogues, numbers):
        """Write and show what the step was like. Raises Ended where it has to be the last."""
        records = self.gather_records([dialogue.record() for dialogue in dialogues], "group")
        row = {"step": step, **progress.summary(records), **numbers}
        row |= progress.judge_totals(self.world.gather(self.judge.take_stats()))
        row["seconds_step"] = sum(row[f"seconds_{phase}"] for phase in ("play", "judge", "learn"))
        row["tokens_per_second"] = row["sampled_tokens"] / row["seconds_play"]
        row["peak_memory_gb"] = max(self.world.gather(peak_memory_gb(self.world.device)))
        self.append("dialogues.jsonl", records)
        self.append("metrics.jsonl", [row])
        self.done = step
        if self.world.rank == 0:
            self.terminal.show(row, self.rows, dialogues[0], len(self.scenarios))
        why = self.terminal.reason_to_stop(row, records)
        ended = (3, f"stopped: {why}, then --resume") if why else (0, "done")
        self.agree(*max(ended, self.stop.verdict))

    def evaluate_if_due(self):
        """Play the held-out scenarios, with the same seeds as ever."""
        settings, step, world = self.settings, self.done, self.world
        due = self.held_out and (step % settings.eval_every == 0 or step == settings.steps)
        if not due or world.broadcast(self.evaluated(step)):
            return
        self.judge.start_batch()
        share = slice(world.rank, None, world.size)
        arguments = self.voice, self.held_out, settings, self.judge, 2, settings.seed, share
        records = self.gather_records(self.unless_stopped(heldout, *arguments), "scenario_id")
        held = heldout_row(records)
        held |= progress.judge_totals(world.gather(self.judge.take_stats()))
        self.append("heldout.jsonl", [{**record, "step": step} for record in records])
        self.append("metrics.jsonl", [{"step": step, "heldout": held}])
        self.say(progress.heldout_line(step, held))

    def evaluated(self, step):
        """Whether this step's evaluation is there already: it was the last that is resumed."""
        return any("heldout" in row and row["step"] == step for row in self.rows())

    def save_if_due(self):
        """A checkpoint every --save-every steps, and of the best held-out reward so far."""
        every = self.settings.save_every
        if (every and self.done % every == 0) or self.is_best():
            self.save()

    def is_best(self):
        """Whether the newest weights are those with the best evaluation so far."""
        return self.world.broadcast(best_step(self.folder) == self.done)

    def save(self):
        """Save the last whole step. Returns False, on all ranks, where the disk is full."""
        folder = save_checkpoint(self.folder, self.done, self.settings, self.policy, self.world)
        if self.world.broadcast(folder is not None):
            self.saved = self.done
        return self.saved == self.done

    def finish(self, code, reason):
        """The last checkpoint, and where everything is. Returns the exit code."""
        if self.saved != self.done and not self.save() and not code:
            code, reason = 3, "the last checkpoint could not be saved; make room, then --resume"
        self.say(
            f"{reason}: {self.folder}/metrics.jsonl (one line a step), {self.folder}/checkpoints/ "
            "(use one with --model)"
        )
        return code


def negotiate(run):
    """Self-play, from the first step to the last checkpoint. Returns the exit code."""
    run.start()
    try:
        run.evaluate_if_due()
        for step in range(run.done + 1, run.settings.steps + 1):
            groups = deal(run.scenarios, run.settings, step, run.world)
            dialogues = list(itertools.chain(*groups))
            played = run.play(dialogues)
            learnt = run.learn(groups)
            run.record(step, dialogues, played | learnt)
            run.evaluate_if_due()
            run.save_if_due()
    except Ended as ended:
        return run.finish(ended.code, ended.reason)
    return run.finish(0, "done")


# ---- the warm start: learn from negotiations that were written -----------------------------------


def imitate(run):
    """The warm start, to the epoch with the lowest held-out loss. Returns the exit code."""
    settings, world = run.settings, run.world
    train_on, held_out = imitation_sets(settings, run.policy)
    epoch = math.ceil(len(train_on) / settings.scenarios_per_step)  # steps
    run.begin()
    run.say(
        f"{settings.model} on {world.size} x {world.device}: {len(train_on)} negotiations to learn "
        f"from, {len(held_out)} held out, {epoch} steps an epoch; results in {run.folder}/"
    )
    try:
        if world.broadcast(best_step(run.folder)) < 0:
            log_heldout_loss(run, held_out, epoch)
        steps = range(run.done + 1, settings.steps + 1)
        for step in tqdm(steps, "steps", settings.steps, initial=run.done, disable=world.rank > 0):
            imitation_step(run, step, deal_demonstrations(train_on, settings, step, epoch))
            ends = step % epoch == 0 or step == settings.steps
            if ends:
                log_heldout_loss(run, held_out, epoch)
            run.agree(*run.stop.verdict)
            if ends and not run.is_best():
                run.saved = step  # on purpose without a checkpoint
                why = "the held-out loss rises, so the checkpoint before is the one to use"
                raise Ended(0, f"done: {why}")
            due = settings.save_every and step % settings.save_every == 0
            if (ends or due) and not run.save():
                raise Ended(3, "a checkpoint could not be saved; make room, then --resume")
    except Ended as ended:
        return run.finish(ended.code, ended.reason)
    return run.finish(0, "done")


def imitation_sets(settings, policy):
    """(Dialogues to learn from, Dialogues of a held-out tenth of the scenarios).

    Raises UserError for a bad --demonstrations file.
    """
    file, chat = settings.demonstrations, selfplay.ChatFormat(policy.tokenizer, policy.model)
    written = data_gen.load_demonstrations(file, settings.scenarios or None)
    names = list(dict.fromkeys(negotiation.scenario.id for negotiation in written))
    held = set(data_gen.spread(names, max(1, len(names) // 10)))
    train_on, held_out, limit = [], [], lm.context_limit(policy.model)
    for negotiation in written:
        dialogue = selfplay.imitate(negotiation, chat, settings)
        tokens = len(dialogue.final_sample.ids)
        if tokens > limit:
            raise UserError(
                f"--demonstrations: one takes {tokens} tokens and {settings.model} holds {limit}; "
                "shorten it, or use another model"
            )
        (held_out if negotiation.scenario.id in held else train_on).append(dialogue)
    if not train_on:
        raise UserError(
            f"--demonstrations {file}: one scenario is too few; a tenth of them is held out"
        )
    return train_on, held_out


def deal_demonstrations(dialogues, settings, step, epoch_steps):
    """The demonstrations of a step, over all ranks: a share of a permutation per epoch."""
    epoch, at = divmod(step - 1, epoch_steps)
    order = np.random.default_rng([settings.seed, epoch]).permutation(len(dialogues))
    share = order[at * settings.scenarios_per_step :][: settings.scenarios_per_step]
    return [dialogues[i] for i in share]


def imitation_step(run, step, dialogues):
    """Learn from a step's demonstrations, and log it.

    Their log-probs are NaN and their advantages 1, so the learner takes the gradient of plain
    likelihood: the policy gradient at ratio 1.
    """
    start, settings, world, trees = time.perf_counter(), run.settings, run.world, []
    for dialogue in dialogues[world.rank :: world.size]:
        trees += grpo.pack([dialogue], settings.train_tokens, settings.micro_tokens)
    backward(run.learner, trees, idle=max(world.gather(len(trees))) - len(trees))
    row = {"step": step, **run.learner.step()}
    row["loss"] = row["entropy"]  # -log-prob a token
    row["seconds_step"] = time.perf_counter() - start
    row["peak_memory_gb"] = peak_memory_gb(world.device)
    run.append("metrics.jsonl", [row])
    run.done = step


def log_heldout_loss(run, dialogues, epoch):
    """Measure the loss on held-out demonstrations, log and show it."""
    total, tokens = run.learner.surprise(dialogues)
    held = {"loss": total / tokens, "tokens": tokens}
    run.append("metrics.jsonl", [{"step": run.done, "heldout": held}])
    epochs = f"{run.done / epoch:.0f} epochs"
    run.say(f"after step {run.done} ({epochs}): held-out loss {held['loss']:.3f} nats a token")


# ---- the command ---------------------------------------------------------------------------------


def main(argv=None):
    """Train. Returns the exit code: 0, 130 after a signal, 3 where the run stopped itself."""
    settings = read_settings(argv)
    if settings.plan:
        return plan.show_plan(settings)
    world = start_world()
    with explained(world), contextlib.ExitStack() as stack:
        run = Run(settings, world, stack)
        code = imitate(run) if settings.demonstrations else negotiate(run)
    if world.size > 1:
        dist.destroy_process_group()
    return code


@contextlib.contextmanager
def explained(world):
    """Turn what ends a run from outside into a UserError."""
    try:
        yield
    except BudgetSpent as spent:
        raise UserError(f"{spent}; raise it") from spent
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the card's memory is full; use a smaller --micro-tokens, --gradient-checkpointing "
            "or --fsdp on more cards (--plan reckons it)"
        ) from error
    except RuntimeError as error:
        if world.size > 1 and (isinstance(error, dist.DistError) or "peer" in str(error)):
            raise UserError(
                "another rank has ended (see its own message); go on from the last checkpoint "
                "with --resume"
            ) from error
        raise


if __name__ == "__main__":
    run_cli(main)
