"""The settings of a run: one frozen dataclass, recipes as data, and how a command line is read.

    command line + recipe (a new run) or config.json (a resumed run)  ->  Settings

Each field is a flag, a key of config.json, and a line of `python train.py --help`. How dialogues
are played stands in selfplay.PlaySettings, how they are judged in reward.JudgeSettings.
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import dataset
import judge_heads
import reward
import rubric
import selfplay
from cli import UserError, check_values, command_line, env_number, option
from model import WARM_MODEL

RECIPES = {
    # Paid is the joint solution, trained the dialogue: chance in writing the one is noise in the
    # other's reward, so there is as little of it as in the paper.
    "debug": {"final_temperature": 0.1},
    # arXiv 2603.10476, as its readers tell it: "What is the paper's, and what is ours" in README.md
    "paper": {
        "max_turns": 7,
        "context_turns": 2,
        "agreement": "judge",
        "on_impasse": "zero",
        "temperature": 0.7,
        "top_p": 0.95,
        "final_temperature": 0.1,
        "final_top_p": 0.95,
        "turn_tokens": 256,
        "final_tokens": 512,
        "group_size": 8,
        "scenarios_per_step": 2,
        "epoch_steps": 0,
        "steps": 1900,
        "lr": 5e-6,
        "beta": 0.0,
        "save_every": 50,
    },
    # the baseline: one agent answers the same dilemma alone
    "single": {"max_turns": 0, "train_tokens": "final", "agreement": "none"},
    # plain likelihood on written negotiations: what made the default model out of smollm2-135m
    "warm-start": {
        "model": "smollm2-135m",
        "demonstrations": str(dataset.DATA / "demonstrations.jsonl"),
        "train_tokens": "both",
        "temperature": 1.0,
        "top_p": 1.0,
        "final_temperature": 1.0,
        "final_top_p": 1.0,
        "scenarios_per_step": 16,
        "steps": 72,
        "lr": 1e-3,
        "warmup_steps": 5,
        "lr_decay": True,
        "keep": 1,
    },
}


@dataclasses.dataclass(frozen=True)
class Settings(selfplay.PlaySettings, reward.JudgeSettings):
    """Everything that a run depends on; saved as config.json in its folder."""

    recipe: str = option("debug", "settings to start from", choices=tuple(RECIPES))
    model: str = option(WARM_MODEL, "this one, smollm2-135m, a folder, or a Hugging Face id")
    scenarios: str = option("", "JSON Lines file of scenarios (empty: the shipped ones)")
    demonstrations: str = option("", "JSON Lines file of negotiations to imitate (empty: play)")
    out: str = option("", "run folder (empty: runs/RECIPE-SEED)")
    resume: str = option("", "run folder to go on with, from its newest complete checkpoint")
    force: bool = option(False, "resume even with settings that change the mathematics")
    seed: int = option(0, "of everything random", low=0)

    steps: int = option(18, "steps: play, judge and learn from a few groups", low=0)
    scenarios_per_step: int = option(3, "groups of a step, over all ranks", low=1, high=10000)
    group_size: int = option(6, "dialogues of a group, with rewards to compare", low=2, high=1000)
    epoch_steps: int = option(6, "steps until scenarios come again (0: when all were seen)", low=0)
    updates_per_rollout: int = option(1, "optimizer steps on the same dialogues", low=1)

    lr: float = option(5e-4, "learning rate of AdamW (for all weights some 2e-5)", low=0)
    warmup_steps: int = option(1, "updates over which the learning rate rises to --lr", low=0)
    lr_decay: bool = option(False, "let the learning rate fall to zero by the last step")
    lora_rank: int = option(16, "train adapters of this rank (0: all weights)", low=0, high=1024)

    train_tokens: str = option(
        "dialogue", "which sampled tokens are trained", choices=("dialogue", "final", "both")
    )
    advantage_scale: str = option(
        "std", "divide a group's centred rewards by their std", choices=("std", "none")
    )
    aggregate: str = option(
        "token", "how token losses are averaged", choices=("token", "sequence", "constant")
    )
    ratio: str = option(
        "token", "importance ratio per token, or per sample (GSPO)", choices=("token", "sequence")
    )
    clip_low: float = option(0.2, "lower clip of the ratio", low=0, high=1)
    clip_high: float = option(0.2, "upper clip of the ratio", low=0)
    beta: float = option(0.0, "weight of the KL to the model before training", low=0)

    dtype: str = option(
        "auto",
        "of the computation (auto: bf16 where it is fast, else fp32); trained weights are fp32",
        choices=("auto", "fp32", "bf16"),
    )
    micro_tokens: int = option(
        0, "tokens of one forward and backward pass (0: 1200 on a CPU, 8192 on a card)", low=0
    )
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    cuda_graphs: bool = option(True, "on a card, decode by replaying recorded steps")
    compile: bool = option(False, "and compile them first (needs a C compiler, takes a minute)")
    fsdp: bool = option(False, "shard weights, gradients and optimizer over the ranks (FSDP2)")
    plan: bool = option(False, "print the memory that a card needs, and end")
    nproc: int = option(1, "cards that --plan reckons with", low=1)
    log: str = option(
        "none",
        "show metrics and transcripts there too (torchrun needs a -- before train.py then)",
        choices=("none", "tensorboard", "wandb"),
    )

    save_every: int = option(0, "steps between checkpoints (0: only at the end)", low=0)
    keep: int = option(2, "checkpoints to keep, beside the best by held-out reward", low=1)
    eval_every: int = option(0, "steps between evaluations on held-out scenarios (0: none)", low=0)
    eval_scenarios: int = option(8, "scenarios that --eval-every keeps out of training", low=2)


# What may differ on resume: where and how fast a run computes. A server or a file may move; what a
# file holds may not change (`check_contents`).
FREE_ON_RESUME = {
    *("resume", "force", "out", "steps", "save_every", "keep", "log"),
    *("micro_tokens", "gradient_checkpointing", "cuda_graphs", "compile"),
    *("rubric", "scenarios", "demonstrations"),
    *("judge_url", "judge_concurrency", "judge_timeout", "judge_deadline", "judge_wait"),
    *("judge_attempts", "judge_budget"),
}


def read_settings(argv=None):
    """Settings from the command line, over those of the recipe or of the run to resume."""

    def base(given):
        return from_run(given) if given.get("resume") else from_recipe(given)

    settings = command_line(Settings, argv, prog="train.py", base=base)
    validate(settings)
    return settings


def from_recipe(given):
    """What flags are laid over, {name: value}: a recipe, with enough groups for all ranks."""
    name = given.get("recipe") or ("warm-start" if given.get("demonstrations") else "debug")
    if given.get("demonstrations") and name != "warm-start":
        raise UserError(f"--recipe {name}: plays; --demonstrations go with --recipe warm-start")
    recipe = {"recipe": name, **RECIPES[name]}
    ranks = env_number("WORLD_SIZE", 1, low=1)
    groups = recipe.get("scenarios_per_step", Settings.scenarios_per_step)
    settings = {**recipe, "scenarios_per_step": math.ceil(groups / ranks) * ranks}
    if given.get("scenarios"):
        settings["epoch_steps"] = 0  # somebody's own set: all of it
    return settings


def from_run(given):
    """The same of a run to resume. Raises UserError where flags would make another run of it."""
    folder = given["resume"]
    saved = saved_config(folder)
    if given.get("out", folder) != folder:
        raise UserError(
            f"--out {given['out']}: a resumed run stays in its folder; leave --out away"
        )
    free = FREE_ON_RESUME
    if saved.get("lr_decay"):
        free = free - {"steps"}  # the last step decides the learning rate of all
    defaults = {f.name: f.default for f in dataclasses.fields(Settings)}
    strange = sorted(saved.keys() - defaults.keys() - {"contents"})
    if strange and not given.get("force"):
        raise UserError(
            f"--resume {folder}: {', '.join(strange)} in its config.json is no setting here; go on "
            "with the code that began the run, or add --force"
        )
    began = {**defaults, **saved}  # a setting that is younger than the run had its default
    differing = [name for name in given if given[name] != began[name]]
    changed = ["--" + name.replace("_", "-") for name in differing if name not in free]
    if changed and not given.get("force"):
        raise UserError(
            f"--resume {folder}: {', '.join(changed)} would change the mathematics of the run; "
            "leave out, or add --force"
        )
    return {**{name: began[name] for name in defaults}, "out": folder}


def saved_config(folder):
    """config.json of a run, a dictionary. Raises UserError where there is none, or a bad value."""
    hint = "name the folder of a run, as runs/debug-0, and not a checkpoint in it"
    with dataset.reading_json(f"{folder}: its config.json", hint):
        saved = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    is_ours = type(saved) is dict and "recipe" in saved  # a checkpoint has one of its own
    if not is_ours or type(saved.get("contents", {})) is not dict:
        raise UserError(f"{folder}: its config.json is not that of a run; {hint}")
    check_values(Settings, saved, f"{folder}: its config.json has ")
    return saved


def validate(settings):
    """Raise UserError for settings that do not go together."""
    trained = settings.train_tokens
    if trained != "dialogue" and settings.final_temperature == 0:
        raise UserError("--final-temperature 0: trained tokens are sampled; use one above 0")
    if trained == "both" and settings.final_temperature != settings.temperature:
        raise UserError("--train-tokens both: --temperature and --final-temperature must be equal")
    if settings.max_turns == 0 and trained != "final":
        raise UserError(
            "--max-turns 0: there is no dialogue to train; add --train-tokens final, "
            "or use --recipe single"
        )
    nucleus = {"dialogue": settings.top_p, "final": settings.final_top_p}
    if settings.beta > 0 and nucleus.get(trained, min(nucleus.values())) < 1:
        # the policy and the reference would be renormalised over different tokens
        raise UserError(
            "--beta: the KL to the reference needs trained tokens that were sampled without a "
            "nucleus; add --top-p 1 --final-top-p 1"
        )


def contents(settings):
    """{what: digest} of what the mathematics takes from files, whatever their paths."""
    file = settings.scenarios or None
    scenarios = dataset.load_scenarios(file, settings.seed)
    found = {
        "scenarios": [dataclasses.asdict(scenario) for scenario in scenarios],
        "rubric": rubric.load_rubric(settings.rubric),
    }
    if settings.demonstrations:
        written = dataset.load_demonstrations(settings.demonstrations, file)
        found["demonstrations"] = [dataclasses.asdict(negotiation) for negotiation in written]
    elif not settings.judge_url:
        found["embedded judge"] = judge_heads.heads_digest()
    for what, value in found.items():
        text = json.dumps(value, sort_keys=True)
        found[what] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def check_contents(settings):
    """`contents(settings)`. Raises UserError where a resumed run began with other files."""
    now = contents(settings)
    if not settings.resume or settings.force:
        return now
    began = saved_config(settings.resume).get("contents", now)
    changed = [what for what in sorted({**began, **now}) if began.get(what) != now.get(what)]
    if changed:
        raise UserError(
            f"--resume {settings.resume}: other {' and '.join(changed)} than the run began with "
            "would change its mathematics; put the files back, or add --force"
        )
    return now
