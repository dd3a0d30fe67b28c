"""Teach a language model to negotiate: play, judge, advantages, loss, step, over and over.

    scenarios -> deal -> selfplay.play, the judge reads along -> advantages, loss, step -> player

    python train.py                                            # the debug recipe, on a laptop
    python train.py --model Qwen/Qwen3-0.6B --judge-url http://127.0.0.1:8000/v1         # 1 GPU
    torchrun --nproc_per_node=8 train.py --recipe paper --model Qwen/Qwen3-14B --fsdp \
        --judge-url http://judge:8000/v1 --judge-model NAME --judge-concurrency 64       # 8 GPUs

What differs from the paper (arXiv 2603.10476); `--recipe paper` takes back 3 to 5:

1. The adapters' model is not quantised (--lora-rank 0 trains all weights); the paper: 4-bit QLoRA.
2. The default model is tiny, so it has imitated written negotiations first (`warm_start_loop`).
3. Agents see the whole dialogue and have 3 turns; the paper: the last two turns, and 7.
4. Without an agreement they write a solution all the same; the paper: none, and reward 0.
5. Groups of 6, lr 5e-4, dialogues at T 0.9, top-p 0.8; the paper: 8, 5e-6, T 0.7, top-p 0.95.
6. A small embedded judge reads; the paper: a large model (here: --judge-url).
7. Rewards no further apart than the judge wobbles are equal; no difference, no step.

Left out: a saved state of random generators. What is drawn depends on (seed, step, scenario,
member, turn) alone, never on the rank, the clock or the order in which the judge answers.
"""

import collections
import contextlib
import itertools
import math
import time

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import dataset
import grpo
import model as lm
import plan
import selfplay
from attention import context_limit
from chat import ChatFormat
from cli import UserError, run_cli
from client import BudgetSpent
from packing import pack
from policy import start_world
from progress import peak_memory_gb
from rubric import Verdict
from run import Ended, Run
from settings import read_settings

# ---- self-play: all of it, over and over ---------------------------------------------------------


def self_play_loop(run):
    """Deal, play, judge, learn, from the first step to the last."""
    scenarios, held_out = divide(run.settings)
    run.begin_play(scenarios, held_out)
    settings, world = run.settings, run.world
    run.evaluate_if_due()
    for step in range(run.done + 1, settings.steps + 1):
        groups = deal(scenarios, settings, step, world)
        dialogues = list(itertools.chain(*groups))  # the same ones, in one list
        start = time.perf_counter()
        rollout(run, step, dialogues)
        played = time.perf_counter()
        means, waited = learn(groups, run.learner, settings, world)
        run.policy.update_player()
        learnt = time.perf_counter()
        seconds = {"play": played - start, "judge": waited, "learn": learnt - played - waited}
        run.log_step(step, dialogues, means, seconds)
        run.evaluate_if_due()
        due = settings.save_every and step % settings.save_every == 0
        if due or run.is_best():
            run.save()


# ---- scenarios -----------------------------------------------------------------------------------


def divide(settings):
    """(scenarios to train on, scenarios that --eval-every holds out).

    With --epoch-steps only so many steps' scenarios, drawn by the seed, are played over and over.
    Raises UserError when none would be left to train on.
    """
    scenarios = dataset.load_scenarios(settings.scenarios or None, settings.seed)
    n = settings.eval_scenarios if settings.eval_every else 0
    if n >= len(scenarios):
        raise UserError(
            f"--eval-scenarios {n}: there are only {len(scenarios)} scenarios; "
            "keep some for training"
        )
    held_out = dataset.spread(scenarios, n) if n else []
    train_on = [scenario for scenario in scenarios if scenario not in held_out]
    if settings.epoch_steps:
        rng = np.random.default_rng([settings.seed, 77])  # 77: `deal` draws so in epoch 77 alone
        order = rng.permutation(len(train_on))
        drawn = order[: settings.epoch_steps * settings.scenarios_per_step]
        train_on = [train_on[i] for i in sorted(drawn)]
    return train_on, held_out


def deal(scenarios, settings, step, world):
    """This rank's groups of a step: lists of empty Dialogues, whole groups only.

    Scenarios come in the order of a permutation per epoch, a function of seed and step alone.
    """
    groups, size = [], settings.group_size
    played = collections.Counter()
    for index in range(settings.scenarios_per_step):
        epoch, at = divmod((step - 1) * settings.scenarios_per_step + index, len(scenarios))
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(scenarios))
        scenario = scenarios[order[at]]
        # one that comes twice in a step goes on counting: other members draw other tokens
        first = played[scenario.id]
        played[scenario.id] += size
        if index % world.size == world.rank:
            members = range(first, first + size)
            groups.append([selfplay.Dialogue(scenario, step, index, member) for member in members])
    return groups


# ---- dialogues -----------------------------------------------------------------------------------


def rollout(run, step, dialogues):
    """Fill these Dialogues in place: turns, streams, joint solution, and a pending verdict.

    The judge is asked after each turn from the second on, and at the end.
    """
    run.judge.start_batch()
    title, hidden = f"step {step}: dialogues", run.world.rank > 0
    with tqdm(total=len(dialogues), desc=title, leave=False, disable=hidden) as bar:
        run.unless_stopped(
            selfplay.play,
            (run.voice, run.voice),
            dialogues,
            run.settings,
            run.judge,
            run.settings.seed,
            on_done=lambda dialogue: bar.update(),
        )


# ---- advantages, loss, optimizer step ------------------------------------------------------------


def learn(groups, learner, settings, world):
    """Pack, settle, gradient, optimizer step; --updates-per-rollout times on the same dialogues.

    The gradient of a group is taken while the judge reads the next. Returns (means of the last
    update, seconds spent waiting for the judge).
    """
    lm.release_memory()
    # Packed before the rewards are known: a missing one changes no rank's number of passes.
    trees_of = [pack(group, settings.train_tokens, settings.micro_tokens) for group in groups]
    passes = sum(len(trees) for trees in trees_of)
    idle = max(world.gather(passes)) - passes  # every rank makes as many as the busiest
    waited, updates = 0.0, []
    for update in range(settings.updates_per_rollout):
        for group, trees in zip(groups, trees_of):
            if update == 0:
                start = time.perf_counter()
                settle(group, settings)
                waited += time.perf_counter() - start
            for tree, samples in trees:
                learner.backward(tree, samples)
        for _ in range(idle):
            learner.idle()
        updates.append(learner.step())
    lm.release_memory()
    skipped = any(means["skipped"] for means in updates)
    gap = updates[0]["logprob_gap"]  # later the policy itself has moved
    return {**updates[-1], "skipped": skipped, "logprob_gap": gap}, waited


def settle(group, settings):
    """Wait for the judge's verdicts on a group and turn its rewards into advantages.

    A missing reward is None, and so is its advantage. Demonstrations have theirs already.
    """
    if group[0].stop == "written":
        return
    for dialogue in group:
        try:
            dialogue.take_verdict()
        except BudgetSpent:
            dialogue.judgement = Verdict(None, "budget spent").record()
    rewards = [math.nan if dialogue.reward is None else dialogue.reward for dialogue in group]
    advantages = grpo.group_advantages(
        torch.tensor([rewards], dtype=torch.float64),  # (1, G)
        settings.advantage_scale,
        noise=settings.judge_noise,
    )
    for dialogue, advantage in zip(group, advantages[0].tolist()):
        dialogue.advantage = None if dialogue.reward is None else advantage


# ---- the warm start: learn from negotiations that were written -----------------------------------


def warm_start_loop(run):
    """The warm start, to the epoch with the lowest held-out loss."""
    settings, world = run.settings, run.world
    train_on, held_out = demonstration_sets(settings, run.policy)
    epoch = math.ceil(len(train_on) / settings.scenarios_per_step)  # steps
    run.begin()
    run.say(
        f"{settings.model} on {world.size} x {world.device}: {len(train_on)} negotiations to learn "
        f"from, {len(held_out)} held out, {epoch} steps an epoch; results in {run.folder}/"
    )
    if run.done == 0:
        log_heldout_loss(run, held_out)
    steps = range(run.done + 1, settings.steps + 1)
    for step in tqdm(steps, "steps", settings.steps, initial=run.done, disable=world.rank > 0):
        demonstration_step(run, step, deal_demonstrations(train_on, settings, step, epoch))
        epoch_ends = step % epoch == 0 or step == settings.steps
        if epoch_ends:
            log_heldout_loss(run, held_out)
        run.end_if_any(*run.stop.ending)
        if epoch_ends and not run.is_best():
            run.saved = step  # on purpose without a checkpoint
            why = "the held-out loss rises, so the checkpoint before is the one to use"
            raise Ended(0, f"done: {why}")
        due = settings.save_every and step % settings.save_every == 0
        if (epoch_ends or due) and not run.save():
            raise Ended(3, "a checkpoint could not be saved; make room, then --resume")


def demonstration_sets(settings, policy):
    """(Dialogues to learn from, Dialogues of a held-out tenth of the scenarios).

    Raises UserError for a bad --demonstrations file.
    """
    file = settings.demonstrations
    chat = ChatFormat(policy.tokenizer, policy.model, settings.date)
    written = dataset.load_demonstrations(file, settings.scenarios or None)
    names = list(dict.fromkeys(negotiation.scenario.id for negotiation in written))
    held = set(dataset.spread(names, max(1, len(names) // 10)))
    train_on, held_out, limit = [], [], context_limit(policy.model)
    for negotiation in written:
        dialogue = selfplay.dialogue_of(negotiation, chat, settings)
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


def demonstration_step(run, step, dialogues):
    """Learn from a step's demonstrations, and log it.

    Their log-probs are NaN and their advantages 1, so the learner takes the gradient of plain
    likelihood: the policy gradient at ratio 1.
    """
    start, world = time.perf_counter(), run.world
    groups = [[dialogue] for dialogue in dialogues[world.rank :: world.size]]
    means, _ = learn(groups, run.learner, run.settings, world)
    row = {"step": step, **means}
    row["loss"] = row["entropy"]  # -log-prob a token
    row["seconds_step"] = time.perf_counter() - start
    row["peak_memory_gb"] = peak_memory_gb(world.device)
    run.append_metrics(row)
    run.done = step


def log_heldout_loss(run, dialogues):
    """Measure the loss on held-out demonstrations, log and show it."""
    total, tokens = run.learner.nll(dialogues)
    held = {"loss": total / tokens, "tokens": tokens}
    run.append_metrics({"step": run.done, "heldout": held})
    run.say(f"after step {run.done}: held-out loss {held['loss']:.3f} nats a token")


# ---- the command ---------------------------------------------------------------------------------


def main(argv=None):
    """Train. Returns the exit code: 0, 130 after a signal, 3 where the run stopped itself."""
    settings = read_settings(argv)
    if settings.plan:
        return plan.show_plan(settings)
    world = start_world()
    with explained(world), contextlib.ExitStack() as stack:
        run = Run(settings, world, stack)
        code = run.carry_out(warm_start_loop if settings.demonstrations else self_play_loop)
    if world.size > 1:
        dist.destroy_process_group()
    return code


@contextlib.contextmanager
def explained(world):
    """Turn what ends a run from outside into a UserError."""
    try:
        yield
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
