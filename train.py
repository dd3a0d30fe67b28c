"""Teach a language model to negotiate: play, judge, advantages, loss, step, over and over, in one straight line.

    python train.py                                          the debug recipe: a warm-started SmolLM2-135M, a laptop, some ten minutes
    python train.py --recipe warm-start --model NAME         imitate written negotiations first, with the same streams and the same learner
    python train.py --judge-url http://127.0.0.1:8000/v1 --judge-model NAME --model Qwen/Qwen3-0.6B
    torchrun --nproc_per_node=8 train.py --recipe paper --model Qwen/Qwen3-14B --fsdp --judge-url ... --judge-model ...

Every number of a run comes from its settings and its seed: what is drawn depends on (seed, step, scenario, member, turn),
never on the rank, the clock or the order in which the judge answers. So there is no random state to save or to lose.
(What it is drawn from is rounded as a batch falls out: in fp32 that shows in the sixth digit, in bf16 it may turn a token.)
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import signal
import statistics
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from tqdm import tqdm

import data_gen
import grpo
import judge_server
import model as lm
import plan
import reward
import selfplay
from checkpoint import append, begin, claim, load_trainer, open_run, save_checkpoint
from cli import UserError, command_line, option, run_cli
from client import BudgetSpent
from eval import heldout, heldout_row
from report import best_step, collapse, diversity, whole_lines

# ---- settings -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings(selfplay.PlaySettings, reward.JudgeSettings):
    """Everything that a run depends on; saved as config.json in its folder."""

    recipe: str = option(
        "debug",
        "a set of settings to start from",
        choices=("debug", "paper", "single", "paper-single", "warm-start"),
    )
    model: str = option(
        lm.WARM_MODEL,
        f"{lm.WARM_MODEL} (smollm2-135m after --recipe warm-start), smollm2-135m, a folder, or a Hugging Face id",
    )
    scenarios: str = option(
        "", "a JSON Lines file of scenarios (empty: the shipped dilemmas and personas)"
    )
    demonstrations: str = option(
        "",
        "a JSON Lines file of written negotiations to imitate instead of playing (recipe warm-start: the shipped ones)",
    )
    out: str = option("", "run folder (empty: runs/RECIPE-SEED)")
    resume: str = option("", "run folder to go on with, from its newest complete checkpoint")
    force: bool = option(False, "resume even with settings that change the mathematics")
    seed: int = option(0, "of everything random", low=0)
    steps: int = option(
        10, "steps; each plays, judges and learns from scenarios-per-step groups", low=0
    )
    scenarios_per_step: int = option(
        2, "groups in a step, over all ranks: a multiple of their number", low=1
    )
    epoch_steps: int = option(
        5,
        "steps of an epoch: a run plays as many scenarios as these take, over and over (0: all scenarios; so too with --scenarios)",
        low=0,
    )
    group_size: int = option(6, "dialogues of one group, whose rewards are compared", low=2)
    lr: float = option(2e-5, "learning rate of AdamW", low=0)
    warmup_steps: int = option(1, "updates over which the learning rate rises to --lr", low=0)
    lr_decay: bool = option(
        False, "let the learning rate fall to zero by the last step, in a straight line"
    )
    grad_clip: float = option(1.0, "largest norm of the gradient (0: no clipping)", low=0)
    train_tokens: str = option(
        "dialogue", "which sampled tokens are trained", choices=("dialogue", "final", "both")
    )
    advantage_scale: str = option(
        "std",
        "divide the centred rewards of a group by their standard deviation, or not",
        choices=("std", "none"),
    )
    aggregate: str = option(
        "token",
        "how token losses are averaged over the batch",
        choices=("token", "sequence", "constant"),
    )
    ratio: str = option(
        "token",
        "importance ratio per token, or one per sample (GSPO)",
        choices=("token", "sequence"),
    )
    clip_low: float = option(0.2, "lower clip of the ratio", low=0, high=1)
    clip_high: float = option(0.2, "upper clip of the ratio", low=0)
    beta: float = option(
        0.0, "weight of the KL to the reference policy (the model before training)", low=0
    )
    updates_per_rollout: int = option(1, "optimizer steps on the same dialogues", low=1)
    micro_tokens: int = option(600, "tokens in one forward and backward pass", low=1)
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, a third more time"
    )
    dtype: str = option(
        "auto",
        "of the computation; the weights that are trained are always fp32 (auto: bf16 where it is fast, else fp32, and a CPU plays from fp16 weights then)",
        choices=("auto", "fp32", "bf16"),
    )
    fsdp: bool = option(False, "shard weights, gradients and optimizer over the ranks (FSDP2)")
    lora_rank: int = option(
        0, "train adapters of this rank instead of the whole model (0: the whole model)", low=0
    )
    plan: bool = option(
        False, "print the memory that a card needs, from the model's config alone, and end"
    )
    nproc: int = option(1, "cards that --plan reckons with", low=1)
    save_every: int = option(0, "steps between checkpoints (0: only at the end)", low=0)
    keep: int = option(2, "checkpoints to keep, beside the best one by held-out reward", low=1)
    eval_every: int = option(
        0,
        "steps between evaluations on held-out scenarios, one before the first step too (0: none)",
        low=0,
    )
    eval_scenarios: int = option(
        8, "scenarios that --eval-every keeps out of training, two dialogues each", low=2
    )


RECIPES = {
    "debug": {},
    # shared knowledge of the paper (arXiv 2603.10476): see "What is the paper's and what is ours" in the README
    "paper": dict(
        epoch_steps=0,
        max_turns=7,
        context_turns=2,
        agreement="judge",
        on_impasse="zero",
        temperature=0.7,
        top_p=0.95,
        final_temperature=0.1,
        final_top_p=0.95,
        group_size=8,
        scenarios_per_step=2,
        lr=5e-6,
        beta=0.0,
        steps=1900,
        train_tokens="dialogue",
        aggregate="token",
        advantage_scale="std",
        turn_tokens=256,
        final_tokens=512,
        save_every=50,
    ),
    # likelihood on written negotiations, adapters only: what made the default model out of smollm2-135m
    "warm-start": dict(
        model="smollm2-135m",
        demonstrations=str(data_gen.DATA / "demonstrations.jsonl"),
        lora_rank=16,
        lr=1e-3,
        warmup_steps=5,
        lr_decay=True,
        steps=72,
        scenarios_per_step=16,
        train_tokens="both",
        temperature=1.0,
        final_temperature=1.0,
        keep=1,
    ),
    "single": dict(max_turns=0, train_tokens="final", agreement="none"),
    "paper-single": dict(
        epoch_steps=0,
        max_turns=0,
        train_tokens="final",
        agreement="none",
        temperature=1.0,
        final_temperature=1.0,
        top_p=1.0,
        final_top_p=1.0,
        beta=0.04,
        group_size=8,
        scenarios_per_step=4,
        lr=5e-6,
        steps=2150,
        final_tokens=512,
        save_every=50,
    ),
}
# Settings that may differ on resume: they change where and how fast a run computes, not what.
FREE_ON_RESUME = {
    "resume",
    "force",
    "out",
    "steps",
    "save_every",
    "keep",
    "micro_tokens",
    "gradient_checkpointing",
    "judge_url",
    "judge_concurrency",
    "judge_timeout",
    "judge_deadline",
    "judge_wait",
    "judge_attempts",
    "judge_budget",
    "judge_cache",
    "rubric",
    "scenarios",
    "demonstrations",
}  # a server or a file may move; what a file holds may not change: see `contents`


def read_settings(argv=None):
    """Settings from the command line, over those of the recipe, or over those of the run that `--resume` names."""

    def base(given):
        """What the flags that were `given` are laid over."""
        if not given.get("resume"):
            recipe = given.get("recipe", "debug")
            own, ranks = (
                {"scenarios_per_step": Settings.scenarios_per_step, **RECIPES[recipe]},
                int(os.environ.get("WORLD_SIZE", 1)),
            )
            own["scenarios_per_step"] = (
                -(-own["scenarios_per_step"] // ranks) * ranks
            )  # a group is never split: each rank has its own
            if given.get("scenarios"):
                own["epoch_steps"] = 0  # somebody's own set: all of it
            return own
        try:
            saved = json.loads(Path(given["resume"], "config.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"--resume {given['resume']}: its config.json cannot be read ({error}); name the folder of a run"
            )
        if given.get("out", given["resume"]) != given["resume"]:
            raise UserError(
                f"--out {given['out']}: a run that is resumed stays in its folder; leave --out away"
            )
        free = FREE_ON_RESUME - (
            {"steps"} if saved.get("lr_decay") else set()
        )  # then the last step decides the learning rate of all
        changed = [k for k in given if k not in free and k in saved and given[k] != saved[k]]
        if changed and not given.get("force"):
            names = ", ".join("--" + k.replace("_", "-") for k in changed)
            raise UserError(
                f"--resume {given['resume']}: {names} would change the mathematics of the run; leave out, or add --force"
            )
        return {
            "epoch_steps": 0,
            **{f.name: saved[f.name] for f in dataclasses.fields(Settings) if f.name in saved},
            "out": given["resume"],
        }

    settings = command_line(Settings, argv, prog="train.py", base=base)
    if settings.train_tokens != "dialogue" and settings.final_temperature == 0:
        raise UserError(
            "--final-temperature 0: final tokens that are trained must be sampled; use a temperature above 0"
        )
    if settings.train_tokens == "both" and settings.final_temperature != settings.temperature:
        raise UserError("--train-tokens both: --temperature and --final-temperature must be equal")
    if settings.max_turns == 0 and settings.train_tokens != "final":
        raise UserError(
            "--max-turns 0: there is no dialogue to train; add --train-tokens final, or use --recipe single"
        )
    nucleus = {
        "dialogue": settings.top_p,
        "final": settings.final_top_p,
        "both": min(settings.top_p, settings.final_top_p),
    }[settings.train_tokens]
    if (
        settings.beta > 0 and nucleus < 1
    ):  # policy and reference would be renormalised over different tokens
        raise UserError(
            "--beta: the KL to the reference needs trained tokens that were sampled without a nucleus; add --top-p 1 --final-top-p 1"
        )
    return settings


def contents(settings):
    """{what: digest} of all that a run's mathematics takes from files, whatever their paths: scenarios, rubric, the embedded judge."""
    found = {
        "scenarios": [
            dataclasses.asdict(s)
            for s in data_gen.load_scenarios(settings.scenarios or None, settings.seed)
        ],
        "rubric": reward.load_rubric(settings.rubric),
    }
    if settings.demonstrations:
        found["demonstrations"] = [
            dataclasses.asdict(d)
            for d in data_gen.load_demonstrations(
                settings.demonstrations, settings.scenarios or None
            )
        ]
    elif not settings.judge_url:
        found["embedded judge"] = judge_server.heads_digest()
    return {
        what: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
        for what, value in found.items()
    }


def check_contents(settings):
    """Raise UserError where a resumed run would go on with another file than it began with. Returns `contents(settings)`."""
    now = contents(settings)
    if settings.resume and not settings.force:
        saved = json.loads(Path(settings.resume, "config.json").read_text()).get("contents", {})
        if changed := sorted(
            what for what in {**saved, **now} if saved and saved.get(what) != now.get(what)
        ):
            raise UserError(
                f"--resume {settings.resume}: other {' and '.join(changed)} than the run began with would change its mathematics; "
                "put the files back, or add --force"
            )
    return now


# ---- ranks ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class World:
    """This process among those that torchrun started (one of one without torchrun)."""

    rank: int
    size: int
    device: torch.device

    def gather(self, thing):
        """The list of every rank's picklable `thing`, on every rank."""
        if self.size == 1:
            return [thing]
        things = [None] * self.size
        dist.all_gather_object(things, thing)
        return things


def start_world():
    """Join the process group that torchrun describes in the environment: NCCL on GPUs, gloo on CPUs."""
    rank, size, local = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    return World(rank, size, device)


# ---- the policy -----------------------------------------------------------------------------------------------------------


def build(settings, world, weights=None):
    """The policy: (learner's model, player's model, tokenizer, optimizer, reference or None).

    Player and learner are one model, except under --fsdp, where the player is a whole copy in the compute dtype.
    """
    source, sharded = weights or settings.model, settings.fsdp and world.size > 1
    model, tokenizer = lm.load(
        source, "fp32", "cpu" if sharded or settings.lora_rank else world.device
    )  # sharding moves it, block by block
    dtype = lm.compute_dtype(settings.dtype, world.device)
    if settings.lora_rank:
        torch.manual_seed(settings.seed)
        lm.add_lora(model, settings.lora_rank)
        if not sharded:  # the frozen base goes to the card in the dtype that it computes in
            for p in model.parameters():
                p.data = p.data if p.requires_grad else p.data.to(dtype)
            model.to(world.device)
    reference = None
    if settings.beta > 0 and not settings.lora_rank:
        reference = lm.load(settings.model, settings.dtype, world.device)[0].requires_grad_(False)
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    player = model
    if sharded:
        player = lm.load(source, settings.dtype, world.device)[0]
        if settings.lora_rank:
            lm.add_lora(player, settings.lora_rank)
        player.requires_grad_(False)
        blocks = lm.inner(model).layers if hasattr(lm.inner(model), "layers") else lm.inner(model).h
        for part in [*blocks, model]:
            fully_shard(
                part, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            )
            part.set_gradient_divide_factor(
                1.0
            )  # sums over ranks, like the other path: D divides once
            part.set_force_sum_reduction_for_comms(True)
        model.token_logprobs = lambda *a: [
            x.clone() for x in lm.token_logprobs(model, *a)
        ]  # FSDP warns of views
        register_fsdp_forward_method(model, "token_logprobs")
    if settings.beta > 0 and settings.lora_rank:
        reference = player  # with its adapters off
    decay_steps = settings.steps * settings.updates_per_rollout if settings.lr_decay else 0
    optimizer = grpo.Optimizer(
        model,
        settings.lr,
        settings.warmup_steps,
        settings.grad_clip,
        torch.float32 if sharded else dtype,
        decay_steps,
    )
    return model, player, tokenizer, optimizer, reference


@torch.no_grad()
def publish(model, player):
    """Give the player the learner's newest weights: under FSDP each is gathered once, outside of any play."""
    if player is model:
        return
    targets = dict(player.named_parameters())
    for name, p in model.named_parameters():
        targets[name].copy_(p.full_tensor())


# ---- a step ---------------------------------------------------------------------------------------------------------------


def divide(settings):
    """(scenarios to train on, drawn by the seed where --epoch-steps says how many; scenarios that --eval-every holds out).

    Raises UserError when none would be left to train on."""
    scenarios, n = (
        data_gen.load_scenarios(settings.scenarios or None, settings.seed),
        settings.eval_scenarios if settings.eval_every else 0,
    )
    if n and len(scenarios) <= n:
        raise UserError(
            f"--eval-scenarios {n}: there are only {len(scenarios)} scenarios; keep some for training"
        )
    held = data_gen.spread(scenarios, n) if n else []
    train_on = [s for s in scenarios if s not in held]
    if settings.epoch_steps:
        drawn = np.random.default_rng([settings.seed, 77]).permutation(
            len(train_on)
        )  # 77: a stream of its own
        train_on = [
            train_on[i] for i in sorted(drawn[: settings.epoch_steps * settings.scenarios_per_step])
        ]
    return train_on, held


def deal(scenarios, settings, step, world):
    """This rank's groups of a step: lists of empty Dialogues, whole groups only.

    Scenarios come in the order of a permutation per epoch, a function of seed and step alone.
    """
    places = [
        divmod((step - 1) * settings.scenarios_per_step + g, len(scenarios))
        for g in range(settings.scenarios_per_step)
    ]
    drawn = [
        int(np.random.default_rng([settings.seed, epoch]).permutation(len(scenarios))[at])
        for epoch, at in places
    ]
    groups = []
    for g in range(world.rank, settings.scenarios_per_step, world.size):
        again = (
            drawn[:g].count(drawn[g]) * settings.group_size
        )  # a scenario that comes twice in a step goes on counting: other members, other draws
        groups.append(
            [
                selfplay.Dialogue(scenarios[drawn[g]], step, g, again + member)
                for member in range(settings.group_size)
            ]
        )
    return groups


def until_stopped(work, stop):
    """((0, "done"), work()), unless a signal or a spent budget ended it: ((exit code, reason), None)."""
    result = None
    if stop.since is not None:  # the signal came while nothing could be given up
        return stop.verdict, None
    try:
        stop.playing = True
        result = work()
    except Stopped:
        pass
    except BudgetSpent as spent:
        return (3, f"stopped: {spent}; raise it, then --resume"), None
    finally:
        stop.playing = False
    return stop.verdict, result


def play(dialogues, voice, settings, judge, stop, world):
    """Play this rank's dialogues to their ends. Returns (exit code, reason): (0, "done") unless they had to be given up."""
    with tqdm(
        total=len(dialogues),
        desc=f"step {dialogues[0].step}: dialogues",
        leave=False,
        disable=world.rank > 0,
    ) as bar:
        talk = lambda: selfplay.play(
            (voice, voice),
            dialogues,
            settings,
            judge,
            settings.seed,
            on_done=lambda d: bar.update(),
        )
        return until_stopped(talk, stop)[0]


def settle(group, settings):
    """Wait for the judge's verdicts on a group and turn its rewards into advantages (None where the reward is missing)."""
    for d in group:
        if d.verdict is not None:
            spent = isinstance(d.verdict.exception(), BudgetSpent)
            verdict = reward.Verdict(None, "budget spent") if spent else d.verdict.result()
            d.reward, d.judge = (
                verdict.value,
                {"raw": verdict.raw, "failures": [verdict.reason] if verdict.reason else []},
            )
    rewards = torch.tensor(
        [[float("nan") if d.reward is None else d.reward for d in group]], dtype=torch.float64
    )
    for d, a in zip(
        group,
        grpo.group_advantages(rewards, settings.advantage_scale, noise=settings.judge_noise)[
            0
        ].tolist(),
    ):
        d.advantage = None if d.reward is None else a


def learn(groups, learner, settings, world):
    """Settle each group as its verdicts arrive and take its gradient while the judge reads the next; then step.

    Returns (means of the last update, seconds spent waiting for the judge).
    """
    lm.release_memory()
    packed = [grpo.pack(group, settings.train_tokens, settings.micro_tokens) for group in groups]
    most = max(world.gather(sum(len(trees) for trees in packed)))
    waited, skipped = 0.0, False
    for update in range(settings.updates_per_rollout):
        passes = 0
        for group, trees in zip(groups, packed):
            if update == 0:
                start = time.perf_counter()
                settle(group, settings)
                waited += time.perf_counter() - start
            for tree, rows in trees:
                learner.backward(tree, rows)
                passes += 1
        for _ in range(most - passes):
            learner.idle()
        means = learner.step()
        skipped |= means["skipped"]
        if update == 0:
            gap = means["logprob_gap"]  # later the policy itself has moved
    lm.release_memory()
    return {**means, "logprob_gap": gap, "skipped": skipped}, waited


def summary(groups, world):
    """What the step's dialogues were like, over all ranks: the keys of metrics.jsonl that no gradient is needed for."""
    facts = [
        fact
        for facts in world.gather(
            [
                {
                    "reward": d.reward,
                    "advantage": d.advantage,
                    "agreed": d.agreed,
                    "turns": len(d.turns),
                    "failed": d.reward is None,
                    "group": d.group,
                    "scenario": d.scenario.id,
                    "truncated": [t.truncated for t in d.turns]
                    + ([d.final_truncated] if d.final is not None else []),
                    "sampled": sum(len(t.logprobs) for t in d.turns)
                    + (sum(d.final_sample.mask) if d.final_sample else 0),
                }
                for group in groups
                for d in group
            ]
        )
        for fact in facts
    ]
    rewards = [f["reward"] for f in facts if f["reward"] is not None]
    by_group, by_scenario = {}, {}
    for f in facts:
        by_group.setdefault(f["group"], []).append(f["advantage"])
        by_scenario.setdefault(f["scenario"], []).extend([f["reward"]] * (f["reward"] is not None))
    uniform = [not any(advantages) for advantages in by_group.values()]  # nothing to learn from
    mean = lambda xs: statistics.fmean(xs) if xs else None
    cut = [t for f in facts for t in f["truncated"]]
    return {
        "reward_mean": mean(rewards),
        "reward_std": statistics.stdev(rewards) if len(rewards) > 1 else None,
        "reward_min": min(rewards, default=None),
        "reward_max": max(rewards, default=None),
        "agreed_rate": mean([f["agreed"] for f in facts]),
        "rewards": {name: mean(rs) for name, rs in by_scenario.items()},
        "turns_mean": mean([f["turns"] for f in facts]),
        "missing_rewards": sum(f["failed"] for f in facts),
        "uniform_groups": mean(uniform),
        "truncated_rate": mean(cut),
        "sampled_tokens": sum(f["sampled"] for f in facts),
    }


def account(step, groups, means, seconds, judge, world):
    """(the step's line of metrics.jsonl, its lines of dialogues.jsonl), over all ranks. seconds: {phase: seconds}."""
    row = {
        "step": step,
        **summary(groups, world),
        **means,
        **judge_totals(world.gather(judge.take_stats())),
        **{f"seconds_{phase}": n for phase, n in seconds.items()},
        "peak_memory_gb": max(world.gather(peak_memory_gb(world.device))),
    }
    mine = [d.record() for group in groups for d in group]
    records = sorted(
        (r for part in world.gather(mine) for r in part), key=lambda r: (r["group"], r["member"])
    )
    return {
        **row,
        "tokens_per_second": row["sampled_tokens"] / seconds["play"],
        **diversity(records),
    }, records


def judge_totals(stats):
    """The judge's counters, summed over ranks; judge_failures is the number of questions that stayed without an answer."""
    missing = {}
    for part in stats:
        for why, n in part["missing"].items():
            missing[why] = missing.get(why, 0) + n
    sums = {
        f"judge_{key}": sum(part[key] for part in stats) for key in stats[0] if key != "missing"
    }
    return {"judge_failures": sum(missing.values()), "judge_missing": missing, **sums}


def alarm(row, records, bad_judge, bad_steps, say):
    """Say what a person should worry about in this step. Returns (exit code, reason): (0, "done") where the run may go on."""
    if row["missing_rewards"] > len(records) / 2:
        say(
            f"    warning: {row['missing_rewards']} of {len(records)} rewards are missing: {row['judge_missing']}",
            flush=True,
        )
    if (
        row["truncated_rate"] and row["truncated_rate"] > 0.5 and row["step"] % 10 == 1
    ):  # the line of each step tells the share
        say(
            "    warning: more than half of the texts were cut off at their limit; raise --turn-tokens or --final-tokens",
            flush=True,
        )
    if row["no_evidence"]:
        say(
            "    no reward of this step differs from its group's others by more than --judge-noise: nothing was learnt",
            flush=True,
        )
    if row["skipped"]:
        say("    warning: the loss or a gradient is not finite; the step was skipped", flush=True)
    if any("budget spent" in r["judge"]["failures"] for r in records):
        return 3, "stopped: all calls of --judge-budget are used; raise it, then --resume"
    if bad_judge >= 5:
        return (
            3,
            f"stopped: more than half of the rewards were missing in {bad_judge} steps in a row; look after the judge, then --resume",
        )
    if bad_steps >= 5:
        return 3, f"stopped: {bad_steps} steps in a row were not finite; lower --lr, then --resume"
    return 0, "done"


# ---- the warm start: learn from negotiations that were written ---------------------------------------------------------


def imitation_sets(settings, chat):
    """(Dialogues to learn from, Dialogues of a held-out tenth of the scenarios). Raises UserError for a bad --demonstrations file."""
    demonstrations = data_gen.load_demonstrations(
        settings.demonstrations, settings.scenarios or None
    )
    names = list(dict.fromkeys(d.scenario.id for d in demonstrations))
    held = set(data_gen.spread(names, max(1, len(names) // 10)))
    sets = [], []
    for d in demonstrations:
        sets[d.scenario.id in held].append(selfplay.imitate(d, chat, settings))
    if not sets[0]:
        raise UserError(
            f"--demonstrations {settings.demonstrations}: one scenario is too few; a tenth of them is held out"
        )
    return sets


def imitation_step(step, dialogues, learner, settings, world):
    """Learn from the step's share of the demonstrations. Returns the learner's means.

    Their log-probs are NaN and their advantages 1, so the learner takes the gradient of plain likelihood: the policy gradient at ratio 1.
    """
    batch = deal_demonstrations(dialogues, settings, step)[world.rank :: world.size]
    trees = [
        tree
        for dialogue in batch
        for tree in grpo.pack([dialogue], settings.train_tokens, settings.micro_tokens)
    ]
    most = max(world.gather(len(trees)))
    for tree, rows in trees:
        learner.backward(tree, rows)
    for _ in range(most - len(trees)):
        learner.idle()
    return learner.step()


def steps_an_epoch(dialogues, settings):
    """Steps that it takes to see each demonstration once."""
    return -(-len(dialogues) // settings.scenarios_per_step)


def deal_demonstrations(dialogues, settings, step):
    """The demonstrations of a step, over all ranks: the next ones of a permutation per epoch, a function of seed and step alone."""
    epoch, at = divmod(step - 1, steps_an_epoch(dialogues, settings))
    order = np.random.default_rng([settings.seed, epoch]).permutation(len(dialogues))
    return [
        dialogues[i]
        for i in order[at * settings.scenarios_per_step :][: settings.scenarios_per_step]
    ]


def imitate(settings, world, stack):
    """The warm start, from the settings to the checkpoint of the epoch with the lowest held-out loss. Returns the exit code."""
    check_ranks(settings, world)
    files = check_contents(settings)
    if settings.resume and world.rank == 0:
        claim(Path(settings.resume), stack)
    out, checkpoint = world.gather(open_run(settings) if world.rank == 0 else None)[0]
    model, _, tokenizer, optimizer, reference = build(
        settings, world, checkpoint if checkpoint and not settings.lora_rank else None
    )
    done = load_trainer(checkpoint, optimizer) if checkpoint else 0
    dialogues, held = imitation_sets(settings, selfplay.ChatFormat(tokenizer, model))
    longest, limit = max(len(d.final_sample.ids) for d in dialogues + held), lm.context_limit(model)
    if longest > limit:
        raise UserError(
            f"--demonstrations: one takes {longest} tokens and {settings.model} holds {limit}; shorten it, or use another model"
        )
    learner = grpo.Learner(model, optimizer, settings, reference)
    if world.rank == 0:
        begin(out, settings, files, model, stack)
    stop, epoch_steps = Stop(world), steps_an_epoch(dialogues, settings)
    known = [
        row["heldout"]["loss"] for row in whole_lines(out / "metrics.jsonl") if "heldout" in row
    ]
    losses = world.gather([loss for loss in known if loss is not None])[0]
    say = print if world.rank == 0 else lambda *a, **k: None
    say(
        f"{settings.model} on {world.size} x {world.device}: {len(dialogues)} negotiations to learn from, {len(held)} held out, {epoch_steps} steps an epoch; "
        f"results in {out}/",
        flush=True,
    )

    def check():
        """Log the held-out loss; True where it is the lowest so far, on all ranks alike."""
        total, tokens = learner.surprise(held)
        losses.append(world.gather(total / tokens)[0])
        if world.rank == 0:
            append(
                out / "metrics.jsonl",
                [{"step": done, "heldout": {"loss": losses[-1], "tokens": tokens}}],
            )
        say(
            f"after step {done} ({done / epoch_steps:.0f} epochs): held-out loss {losses[-1]:.3f} nats a token",
            flush=True,
        )
        return losses[-1] == min(losses)

    code, reason = 0, "done"
    if not losses:
        check()
    bar = stack.enter_context(
        tqdm(total=settings.steps, initial=done, desc="steps", disable=world.rank > 0)
    )
    for step in range(done + 1, settings.steps + 1):
        began = time.perf_counter()
        means = imitation_step(step, dialogues, learner, settings, world)
        done, seconds = step, time.perf_counter() - began
        if world.rank == 0:
            append(
                out / "metrics.jsonl",
                [
                    {
                        "step": step,
                        **means,
                        "loss": means["entropy"],
                        "seconds_step": seconds,
                        "peak_memory_gb": peak_memory_gb(world.device),
                    }
                ],
            )
        bar.set_postfix_str(
            f"loss {means['entropy']:.3f}, {means['trained_tokens'] / seconds:.0f} tokens/s"
        )
        bar.update()
        code, reason = max(world.gather(stop.verdict))
        ends = step % epoch_steps == 0 or step == settings.steps
        if ends and not check() and not code:
            reason = "done: the held-out loss rises, so the checkpoint before is the one to use"
            break
        if code or ends or settings.save_every and step % settings.save_every == 0:
            saved = world.gather(
                save_checkpoint(out, done, settings, model, tokenizer, optimizer, world) is not None
            )[0]
            code, reason = (
                (code, reason)
                if saved
                else (3, "a checkpoint could not be saved; make room, then --resume")
            )
        if code:
            break
    bar.close()
    say(
        f"{reason}: {out}/metrics.jsonl (one line a step), {out}/checkpoints/ (use one with --model)",
        flush=True,
    )
    return code


# ---- held-out scenarios ------------------------------------------------------------------------------------------------


def evaluate(out, step, voice, scenarios, settings, judge, stop, world, say):
    """Play the held-out scenarios with the same seeds as ever; a line of its own in metrics.jsonl, the dialogues in heldout.jsonl.

    Returns (exit code, reason) as `play` does; what had to be given up leaves no line.
    """
    judge.start_batch()
    outcome, mine = until_stopped(
        lambda: heldout(
            voice, scenarios, settings, judge, 2, settings.seed, slice(world.rank, None, world.size)
        ),
        stop,
    )
    outcome = max(world.gather(outcome))
    if outcome[0]:
        return outcome
    records = sorted(
        (r for part in world.gather(mine) for r in part),
        key=lambda r: (r["scenario_id"], r["member"]),
    )
    held = {**heldout_row(records), **judge_totals(world.gather(judge.take_stats()))}
    if world.rank == 0:
        append(out / "heldout.jsonl", [{**r, "step": step} for r in records])
        append(out / "metrics.jsonl", [{"step": step, "heldout": held}])
    number = lambda key: "-" if held[key] is None else f"{held[key]:.3f}"
    say(
        f"    held-out reward after step {step}: {number('reward')} ({number('reward_low')} to {number('reward_high')}, {held['n']} dialogues, "
        f"{held['missing']} missing)",
        flush=True,
    )
    return outcome


def calls_left(settings, out, world):
    """This rank's share of --judge-budget, less what the steps before a resume have used."""
    file = out / "metrics.jsonl"
    used = (
        sum(row.get("heldout", row).get("judge_calls", 0) for row in whole_lines(file))
        if settings.judge_budget
        else 0
    )
    return max(1, (settings.judge_budget - used) // world.size) if settings.judge_budget else 0


# ---- what a person sees ---------------------------------------------------------------------------------------------------


def show(row, dialogue, settings, started):
    """Two readable lines on the step and one of its dialogues."""
    number = lambda key, form=".2f": "-" if row[key] is None else f"{row[key]:{form}}"
    left = (time.time() - started) / max(1, row["steps_here"]) * (settings.steps - row["step"])
    print(
        f"step {row['step']}/{settings.steps}  reward {number('reward_mean')} (std {number('reward_std')}, {number('reward_min')} to {number('reward_max')})"
        f"  agreed {row['agreed_rate']:.0%}  turns {row['turns_mean']:.1f}  cut off {number('truncated_rate', '.0%')}  judge failures {row['judge_failures']}\n"
        f"    loss {row['loss']:+.4f}  grad norm {row['grad_norm']:.2f}  entropy {row['entropy']:.2f}  sampler gap {row['logprob_gap']:.4f}"
        f"  |  play {row['seconds_play']:.0f} s ({row['tokens_per_second']:.0f} tokens/s), judge {row['seconds_judge']:.0f} s, learn {row['seconds_learn']:.0f} s"
        f"  |  {row['peak_memory_gb']:.1f} GB, {left / 60:.0f} min left"
    )
    print(selfplay.transcript(dialogue, indent="    "), flush=True)


def epoch_news(rows, step, settings, scenarios):
    """What the epoch that ended with this step earned on the scenarios of the first one, as a line; "" where none ended, or it was the first.

    rows: the lines of metrics.jsonl. Steps play different scenarios, which differ by more than a few steps teach; a second visit to the same ones does not.
    """
    epoch, before = (n * settings.scenarios_per_step // scenarios for n in (step, step - 1))
    if epoch == before or epoch < 2:
        return ""
    visits = {}
    for row in rows:
        for name, value in row.get("rewards", {}).items():
            visits.setdefault(name, []).append(value)
    pairs = [
        (v[0], v[epoch - 1])
        for v in visits.values()
        if len(v) >= epoch and None not in (v[0], v[epoch - 1])
    ]
    if len(pairs) < 2:
        return ""
    first, now = (statistics.fmean(column) for column in zip(*pairs))
    error = statistics.stdev(b - a for a, b in pairs) / len(pairs) ** 0.5
    return (
        f"    epoch {epoch}: reward {now:.2f}, in the first epoch {first:.2f} on the same {len(pairs)} scenarios: {now - first:+.2f} "
        f"(standard error {error:.2f}), higher on {sum(b > a for a, b in pairs)}"
    )


def peak_memory_gb(device):
    """The most memory this process has held: on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path(
        "/proc/self/status"
    )  # getrusage would also count what the process that started us had held
    if status.exists() and "VmHWM:" in (text := status.read_text()):
        return int(text.split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS counts in bytes


class Stopped(KeyboardInterrupt):
    """The dialogues being played are given up."""


class Stop:
    """SIGINT and SIGTERM end the run with a checkpoint: what is being played is given up, what is being learnt is finished.

    A second signal ends the run at once. torchrun passes on the Ctrl-C that every rank has seen already: what
    comes within 2 seconds of the first is taken for that.
    """

    def __init__(self, world):
        self.since, self.playing, self.world = None, False, world
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    @property
    def verdict(self):
        """(exit code, reason), as from `alarm`."""
        return (0, "done") if self.since is None else (130, "interrupted")

    def __call__(self, number, frame):
        if self.since is None:
            self.since = time.monotonic()
            if self.world.rank == 0:
                os.write(
                    2,
                    b"\nstopping, with a checkpoint of the last whole step (once more: at once)\n",
                )
        elif self.world.size == 1 or time.monotonic() - self.since > 2:
            raise KeyboardInterrupt
        if self.playing:
            self.playing = False
            raise Stopped


# ---- the loop -------------------------------------------------------------------------------------------------------------


def main(argv=None):
    """Train. Returns the exit code: 0, 130 after SIGINT or SIGTERM, 3 where the run stopped itself (judge gone, budget spent, not finite)."""
    settings = read_settings(argv)
    if settings.plan:
        return plan.show_plan(settings)
    world = start_world()
    try:
        with contextlib.ExitStack() as stack:
            code = (imitate if settings.demonstrations else run)(settings, world, stack)
    except BudgetSpent as spent:
        raise UserError(f"{spent}; raise it")
    except torch.OutOfMemoryError:
        raise UserError(
            "the card's memory is full; use a smaller --micro-tokens, --gradient-checkpointing or --fsdp on more cards (--plan reckons it)"
        )
    except RuntimeError as error:
        if world.size > 1 and (isinstance(error, dist.DistError) or "peer" in str(error)):
            raise UserError(
                "another rank has ended (see its own message); go on from the last checkpoint with --resume"
            )
        raise
    if world.size > 1:
        dist.destroy_process_group()
    return code


def check_ranks(settings, world):
    """Raise UserError where this number of ranks, or of machines, cannot do what the settings say."""
    if settings.scenarios_per_step % world.size:
        raise UserError(
            f"--scenarios-per-step {settings.scenarios_per_step}: {world.size} ranks need a multiple of {world.size}"
        )
    if not (settings.judge_url or settings.demonstrations) and world.size > int(
        os.environ.get("LOCAL_WORLD_SIZE", world.size)
    ):
        raise UserError(
            "--judge-url: the embedded judge serves one machine only; name a server that all nodes reach"
        )


def train_step(step, scenarios, voice, learner, player, settings, judge, stop, world):
    """One step: play, judge, learn, publish. Returns ((exit code, reason), its line of metrics.jsonl, its lines of dialogues.jsonl, a dialogue to
    show); with an exit code the step was given up, and nothing of it is kept."""
    clock = time.perf_counter()
    groups = deal(scenarios, settings, step, world)
    dialogues = [d for group in groups for d in group]
    judge.start_batch()
    outcome = max(world.gather(play(dialogues, voice, settings, judge, stop, world)))
    if outcome[0]:
        return outcome, None, None, None
    played = time.perf_counter()
    means, waited = learn(groups, learner, settings, world)
    publish(learner.model, player)
    now = time.perf_counter()
    seconds = {
        "play": played - clock,
        "judge": waited,
        "learn": now - played - waited,
        "step": now - clock,
    }
    return outcome, *account(step, groups, means, seconds, judge, world), dialogues[0]


def run(settings, world, stack):
    """The whole run, from the settings to the last checkpoint."""
    check_ranks(settings, world)
    files = check_contents(settings)
    scenarios, held = divide(settings)
    if settings.resume and world.rank == 0:
        claim(Path(settings.resume), stack)
    out, checkpoint = world.gather(open_run(settings) if world.rank == 0 else None)[0]
    model, player, tokenizer, optimizer, reference = build(
        settings, world, checkpoint if checkpoint and not settings.lora_rank else None
    )
    start = load_trainer(checkpoint, optimizer) if checkpoint else 0
    publish(model, player)
    voice = selfplay.voice(player, tokenizer)
    if settings.final_tokens + selfplay.room(settings) >= lm.context_limit(model):
        raise UserError(
            f"--turn-tokens, --final-tokens: {settings.model} holds {lm.context_limit(model)} tokens in all; use fewer"
        )
    learner = grpo.Learner(model, optimizer, settings, reference)
    asking = dataclasses.replace(settings, judge_budget=calls_left(settings, out, world))
    judge = stack.enter_context(
        reward.open_judge(asking, world.rank, lambda value: world.gather(value)[0])
    )
    if settings.agreement == "judge" and settings.max_turns and not judge.can("agreed"):
        raise UserError(
            f"--agreement judge: {judge.model} is a reward model and knows scores only; add --agreement marker, or none"
        )
    settings = dataclasses.replace(
        settings, judge_model=judge.model, judge_mode=judge.mode
    )  # decided once: a resumed run reads as this one does
    judge.take_stats()  # without the first question, so that a resumed run counts what an unbroken one counts
    if world.rank == 0:
        begin(out, settings, files, model, stack)
    stop, began, bad_judge, bad_steps, code, reason = Stop(world), time.time(), 0, 0, 0, "done"
    done = saved = start if checkpoint else -1
    first = next((row for row in whole_lines(out / "metrics.jsonl") if "heldout" not in row), {})
    due = lambda step: held and (step % settings.eval_every == 0 or step == settings.steps)
    save = lambda: world.gather(
        save_checkpoint(out, done, settings, model, tokenizer, optimizer, world)
    )[0]
    say = print if world.rank == 0 else lambda *a, **k: None
    say(
        f"{settings.model} on {world.size} x {world.device}, {next(player.parameters()).dtype}; {len(scenarios)} scenarios"
        f"{' over and over (--epoch-steps 0: all)' if settings.epoch_steps else ''}, {settings.scenarios_per_step} x {settings.group_size} dialogues "
        f"a step; results in {out}/",
        flush=True,
    )
    if (
        due(start)
        and not world.gather(
            any(
                "heldout" in row and row["step"] == start
                for row in whole_lines(out / "metrics.jsonl")
            )
        )[0]
    ):
        code, reason = evaluate(out, start, voice, held, settings, judge, stop, world, say)
    for step in range(start + 1, settings.steps + 1 if not code else 0):
        (code, reason), row, records, shown = train_step(
            step, scenarios, voice, learner, player, settings, judge, stop, world
        )
        if code:
            break
        done = step
        first = first or row
        if world.rank == 0:
            append(out / "dialogues.jsonl", records)
            append(out / "metrics.jsonl", [row])
            show({**row, "steps_here": step - start}, shown, settings, began)
            if news := epoch_news(
                whole_lines(out / "metrics.jsonl"), step, settings, len(scenarios)
            ):
                print(news, flush=True)
        bad_judge = bad_judge + 1 if row["missing_rewards"] > len(records) / 2 else 0
        bad_steps = bad_steps + 1 if row["skipped"] else 0
        if signs := collapse(row, first):
            say(f"    warning: possible collapse: {signs}", flush=True)
        code, reason = max(
            world.gather(max(alarm(row, records, bad_judge, bad_steps, say), stop.verdict))
        )
        if due(step) and not code:
            code, reason = evaluate(out, step, voice, held, settings, judge, stop, world, say)
        keep = (
            settings.save_every
            and step % settings.save_every == 0
            or held
            and best_step(out) == step
        )
        if world.gather(keep)[0] and world.gather(save() is not None)[0]:
            saved = step
        if code:
            break
    done = max(done, 0)
    if saved != done and not world.gather(save() is not None)[0] and not code:
        code, reason = 3, "the last checkpoint could not be saved; make room, then --resume"
    say(
        f"{reason}: {out}/metrics.jsonl (one line a step), {out}/dialogues.jsonl (every token), {out}/checkpoints/",
        flush=True,
    )
    return code


if __name__ == "__main__":
    run_cli(main)
