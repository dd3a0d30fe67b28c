"""A run as a thing that lives: its folder, policy, learner and judge, and how it ends.

    Settings -> Run -> begin_play, or begin -> log_step, evaluate_if_due, save ... -> the exit code
    a signal, a spent budget, a judge gone silent -> Ended, on all ranks -> the last checkpoint

train.py has the steps; this has what is around them. One process writes a folder, the others ask
it. Left out: a second try of anything. What ends a run ends it with a checkpoint, and --resume goes
on.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import filelock

import grpo
import progress
import reward
import selfplay
from attention import context_limit
from chat import Voice
from checkpoint import (
    append,
    best_step,
    checkpoints_of,
    load_trainer,
    save_checkpoint,
    whole_lines,
    write_atomically,
)
from cli import UserError, env_number
from client import BudgetSpent
from dataset import reading_json
from eval import heldout, heldout_row
from policy import build
from settings import check_contents

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
    def ending(self):
        """(exit code, reason); code 0: go on."""
        return (0, "done") if self.since is None else (130, "interrupted")


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
        if world.rank == 0 and settings.log != "none":
            progress.log_package(settings.log)
        if settings.fsdp and world.size == 1:
            print("warning: --fsdp: one process has nothing to share; ignored", file=sys.stderr)
        if settings.compile and world.device.type == "cpu" and world.rank == 0:
            print("warning: --compile: a CPU decodes without; ignored", file=sys.stderr)
        self.log, self.scenarios = None, []
        self.contents = check_contents(settings)
        if settings.resume and world.rank == 0:
            claim(Path(settings.resume), stack)
        found = open_run(settings) if world.rank == 0 else None
        self.folder, checkpoint = world.broadcast(found)
        self.policy = build(settings, world, None if settings.lora_rank else checkpoint)
        self.done, self.saved = 0, None  # the last whole step, the last one with a checkpoint
        if checkpoint:
            optimizer = self.policy.optimizer
            self.done = self.saved = world.together(lambda: load_trainer(checkpoint, optimizer))
        self.policy.update_player()
        self.learner = grpo.Learner(
            self.policy.model, self.policy.optimizer, settings, self.policy.reference
        )

    def begin_play(self, scenarios, held_out):
        """Begin self-play on these scenarios: find the judge, then `begin`."""
        settings, world, player = self.settings, self.world, self.policy.player
        self.scenarios, self.held_out = scenarios, held_out
        self.voice = Voice(player, self.policy.tokenizer, settings.date)
        refuse_too_long([*scenarios, *held_out], self.voice, settings)
        self.judge = self.stack.enter_context(self.open_judge())
        self.judge.check_agreement(settings)
        found = {"judge_model": self.judge.model, "judge_mode": self.judge.mode}
        self.settings = dataclasses.replace(settings, **found)  # a resumed run reads alike
        self.judge.take_stats()  # the first question is of no step
        self.begin()
        again = " over and over (--epoch-steps 0: all)" if settings.epoch_steps else ""
        self.say(
            f"{settings.model} on {world.size} x {world.device}, {next(player.parameters()).dtype}"
            f"; {len(scenarios)} scenarios{again}, {settings.scenarios_per_step} x "
            f"{settings.group_size} dialogues a step; results in {self.folder}/"
        )

    def open_judge(self):
        """The judge, with this rank's share of calls in flight and of what --judge-budget left."""
        settings, world = self.settings, self.world
        on_this_machine = env_number("LOCAL_WORLD_SIZE", world.size, low=1)
        if not settings.judge_url and world.size > on_this_machine:
            raise UserError(
                "--judge-url: the embedded judge serves one machine only; "
                "name a server that all nodes reach"
            )
        left = settings.judge_budget
        if left:
            left -= sum(row.get("heldout", row).get("judge_calls", 0) for row in self.metrics())
            left = world.share(world.broadcast(max(1, left)))  # rank 0 has the file
        at_once = world.share(settings.judge_concurrency)
        asking = dataclasses.replace(settings, judge_budget=left, judge_concurrency=at_once)
        return reward.open_judge(asking, world.rank, world.broadcast)

    def begin(self):
        """Take the folder; from now on signals end the run in order."""
        if self.world.rank == 0:
            take_folder(self.folder, self.settings, self.contents, self.policy.model, self.stack)
            if self.settings.log != "none":
                self.log = progress.Log(self.settings.log, self.folder, self.done, self.stack)
        self.stop = Stop(self.world)

    def metrics(self):
        """The lines of metrics.jsonl so far."""
        return whole_lines(self.folder / "metrics.jsonl")

    def append(self, name, records):
        """Append records to a file of the run's folder, on rank 0."""
        if self.world.rank == 0:
            append(self.folder / name, records)

    def append_metrics(self, row, dialogue=None):
        """Append a line to metrics.jsonl; show it, and a dialogue, where --log says."""
        self.append("metrics.jsonl", [row])
        if self.log:
            self.log.write(row, progress.transcript(dialogue) if dialogue else "")

    def say(self, text):
        """Print on rank 0."""
        if self.world.rank == 0:
            print(text, flush=True)

    def gather_records(self, records, key):
        """The records of all ranks, sorted by `key` and member."""
        everyone = itertools.chain(*self.world.gather(records))
        return sorted(everyone, key=lambda record: (record[key], record["member"]))

    def log_step(self, step, dialogues, means, seconds):
        """Write and show what a step was like. Raises Ended where the run cannot go on.

        means: of the learner. seconds: {"play" | "judge" | "learn": time}.
        """
        records = self.gather_records([dialogue.record() for dialogue in dialogues], "group")
        row = {"step": step, **progress.summary(records), **means}
        row |= progress.judge_totals(self.world.gather(self.judge.take_stats()))
        row |= {f"seconds_{phase}": time for phase, time in seconds.items()}
        row["seconds_step"] = sum(seconds.values())
        row["tokens_per_second"] = row["sampled_tokens"] / seconds["play"]
        memory = progress.peak_memory_gb(self.world.device)
        row["peak_memory_gb"] = max(self.world.gather(memory))
        self.append("dialogues.jsonl", records)
        self.append_metrics(row, dialogues[0])
        self.done = step
        ending = self.stop.ending
        if self.world.rank == 0:
            rows = [row for row in self.metrics() if "heldout" not in row]
            progress.show(row, rows, dialogues[0], self.settings)
            if why := progress.reason_to_stop(rows, records):
                ending = max(ending, (3, f"stopped: {why}, then --resume"))
        self.end_if_any(*ending)

    def evaluate_if_due(self):
        """Play the held-out scenarios, with the same seeds as ever."""
        settings, step, world = self.settings, self.done, self.world
        due = self.held_out and (step % settings.eval_every == 0 or step == settings.steps)
        if not due:
            return
        # the step from which a run goes on has its evaluation, unless a signal cut it off
        there = any("heldout" in row and row["step"] == step for row in self.metrics())
        if world.broadcast(there):
            return
        self.judge.start_batch()
        share = slice(world.rank, None, world.size)
        arguments = self.voice, self.held_out, settings, self.judge
        played = self.unless_stopped(heldout, *arguments, seed=settings.seed, share=share)
        records = self.gather_records(played, "scenario_id")
        held = heldout_row(records)
        held |= progress.judge_totals(world.gather(self.judge.take_stats()))
        self.append("heldout.jsonl", [{**record, "step": step} for record in records])
        self.append_metrics({"step": step, "heldout": held})
        self.say(progress.heldout_line(step, held))

    def is_best(self):
        """Whether the newest weights are those with the best evaluation so far."""
        return self.world.broadcast(best_step(self.folder) == self.done)

    def save(self):
        """Save the last whole step. Returns False, on all ranks, where the disk is full."""
        folder = save_checkpoint(self.folder, self.done, self.settings, self.policy, self.world)
        if self.world.broadcast(folder is not None):
            self.saved = self.done
        return self.saved == self.done

    def end_if_any(self, code, reason):
        """Raise Ended on all ranks where one of them has an exit code."""
        code, reason = max(self.world.gather((code, reason)))
        if code:
            raise Ended(code, reason)

    def unless_stopped(self, play, *arguments, **more):
        """play(...); raises Ended on all ranks where a signal or a spent budget ends it on one."""
        result, spent = None, (0, "")
        try:
            self.stop.playing = True
            if self.stop.since is None:
                result = play(*arguments, **more)
        except Stopped:
            pass  # given up
        except BudgetSpent as error:
            spent = (3, f"stopped: {error}; raise it, then --resume")
        finally:
            self.stop.playing = False
        self.end_if_any(*max(spent, self.stop.ending))
        return result

    def carry_out(self, steps):
        """Call steps(run), save the last step, say where everything is. Returns the exit code."""
        code, reason = 0, "done"
        try:
            steps(self)
        except Ended as ended:
            code, reason = ended.code, ended.reason
        if self.saved != self.done and not self.save() and not code:
            code, reason = 3, "the last checkpoint could not be saved; make room, then --resume"
        if self.scenarios:
            played = self.done, self.settings.scenarios_per_step, len(self.scenarios)
            self.say(progress.closing_words(self.metrics(), *played))
        self.say(
            f"{reason}: {self.folder}/metrics.jsonl (one line a step), {self.folder}/checkpoints/ "
            "(use one with --model)"
        )
        return code


def refuse_too_long(scenarios, voice, settings):
    """Raise UserError where the longest scenario leaves no room for a turn and a solution."""
    longest = max(scenarios, key=lambda scenario: len(str(scenario)))
    dialogue = selfplay.Dialogue(longest, step=0, group_index=0, member=0)
    match = selfplay.Match(dialogue, (voice, voice), settings, judge=None, seed=0)
    say = match.next_say(0, unless=None) if settings.max_turns else match.final_say()
    if say is None:
        raise UserError(
            f"--turn-tokens, --final-tokens: {settings.model} holds {context_limit(voice.model)} "
            f"tokens in all, too few for scenario {longest.id}; use fewer, or shorten it"
        )


# ---- the folder becomes this run's ---------------------------------------------------------------


@contextlib.contextmanager
def taking(out):
    """Inside this block an OSError means that the folder of --out cannot be a run's."""
    try:
        yield
    except OSError as error:  # a name too long, a folder of somebody else's
        raise UserError(f"--out {out}: {error.strerror}; choose a folder of yours") from error


def claim(out, stack):
    """Hold the run folder until `stack` closes. Raises UserError where another run holds it."""
    with taking(out):
        out.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(filelock.FileLock(out / ".lock", timeout=0))
        except filelock.Timeout as error:
            raise UserError(
                f"--out {out}: another run is writing there; let it end, or choose another folder"
            ) from error
        except OSError as error:  # a file system without locks, as on some clusters
            print(f"warning: --out {out}: not locked ({error.strerror})", file=sys.stderr)


def open_run(settings):
    """(run folder, its newest complete checkpoint or None where the run begins).

    On resume, what a kill left behind goes, and so do the lines of steps after that checkpoint:
    they are played again and come out the same. Raises UserError where a new run's folder holds
    something.
    """
    out = Path(settings.out or f"runs/{settings.recipe}-{settings.seed}")
    if not settings.resume:
        refuse_taken(out)
        return out, None
    for unfinished in (out / "checkpoints").glob(".partial-step_*"):
        shutil.rmtree(unfinished)
    checkpoints = checkpoints_of(out)
    newest = checkpoints[-1] if checkpoints else None
    done = int(newest.name.removeprefix("step_")) if newest else -1
    for name in ("metrics.jsonl", "dialogues.jsonl", "heldout.jsonl"):
        if (out / name).exists():
            cut_after(out / name, done)
    return out, newest


def cut_after(path, step):
    """Cut a JSON Lines file where a line of a later step begins, or half a line."""
    with open(path, "r+b") as file:
        end = 0
        for number, line in enumerate(file, 1):
            with reading_json(f"{path}:{number}", "take it out"):
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            end += len(line)
        file.truncate(end)


def refuse_taken(out):
    """Raise UserError where `out` is not a folder, or holds something."""
    litter = {".config.json.tmp", ".lock"}  # of a run that was killed as it began
    with taking(out):
        free = not out.exists() or out.is_dir() and {path.name for path in out.iterdir()} <= litter
    if not free:
        raise UserError(
            f"--out {out}: something is already there; choose another folder, "
            f"or go on with --resume {out}"
        )


def take_folder(out, settings, contents, model, stack):
    """Make the folder this run's own, now that nothing else can be wrong; write config.json.

    contents: digests of the files that it reads. Raises UserError where not one checkpoint fits.
    """
    if not settings.resume:
        needed = 0  # weight and two moments in fp32 of what is trained, the rest as it is
        for parameter in model.parameters():
            each = 12 if parameter.requires_grad else parameter.element_size()
            needed += parameter.numel() * each
        place = next(place for place in (out, *out.parents) if place.exists())
        free = shutil.disk_usage(place).free
        if free < 1.05 * needed:
            raise UserError(
                f"--out {out}: not one checkpoint fits there ({needed / 1e9:.2f} GB are needed, "
                f"{free / 1e9:.2f} are free); make room, or choose another folder"
            )
        claim(out, stack)
        refuse_taken(out)  # nobody else has begun there meanwhile
    config = dataclasses.asdict(dataclasses.replace(settings, resume="", force=False))
    config["contents"] = contents
    write_atomically(out / "config.json", json.dumps(config, indent=1))
