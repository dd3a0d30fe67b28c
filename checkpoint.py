"""A run's folder: one writer, whole lines, checkpoints that are complete or not there at all.

    config.json  metrics.jsonl  dialogues.jsonl  heldout.jsonl
    checkpoints/step_NNNNNN/    a plain Hugging Face folder; trainer.pt, the optimizer's moments;
                                adapter.safetensors of --lora-rank

There is no random state to keep: what a step draws depends on (seed, step, scenario, member, turn).
"""

import contextlib
import io
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

import model as lm
from cli import UserError
from dataset import reading_json
from policy import placed, reading, whole_state
from settings import saved_config

# ---- what a run folder holds ---------------------------------------------------------------------


def whole_lines(path):
    """The objects of a JSON Lines file, if it is there; a half line, left by a kill, is skipped."""
    with open(path, "rb") if Path(path).exists() else io.BytesIO() as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                if type(value := json.loads(line)) is dict:
                    yield value


def config_of(run):
    """The settings of a run, a dict; empty without a config.json. UserError as `saved_config`."""
    return saved_config(run) if os.path.lexists(Path(run, "config.json")) else {}


def best_step(run):
    """The step of the highest held-out reward, or of the lowest held-out loss; -1 without any."""
    scored = []
    with reading_json(f"{run}/metrics.jsonl: a line", "take it out"):
        for row in whole_lines(run / "metrics.jsonl"):
            held = row.get("heldout", {})
            if held.get("loss") is not None:
                scored.append((-held["loss"], int(row["step"])))
            elif held.get("reward") is not None:
                scored.append((held["reward"], int(row["step"])))
        return max(scored)[1] if scored else -1


def checkpoints_of(run):
    """The complete checkpoints of a run in their order, and not what else stands beside them."""
    found = (run / "checkpoints").glob("step_*")
    ours = [path for path in found if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted(ours, key=lambda path: int(path.name[5:]))


def locate(name):
    """(what to load, its run folder or None). A run folder stands for its best checkpoint.

    Where no held-out reward was measured, or the best is not kept, it is the newest complete one.
    """
    folder = Path(name)
    if os.path.isdir(folder / "checkpoints"):  # False, too, where nobody may look
        steps = checkpoints_of(folder)
        if not steps:
            raise UserError(
                f"{name}: this run holds no complete checkpoint; let it train on, "
                "or name another folder"
            )
        best = folder / "checkpoints" / f"step_{best_step(folder):06d}"
        folder = best if best in steps else steps[-1]
    if folder.parent.name != "checkpoints":
        return name, None
    return str(folder), folder.parent.parent


# ---- writing -------------------------------------------------------------------------------------


def write_atomically(path, text):
    """Write a file beside `path`, fsync it and rename it into place."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    sync(scratch)
    scratch.replace(path)


def sync(path):
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def append(path, records):
    """Append records to a JSON Lines file. Raises UserError when the disk is full."""
    lines = "".join(json.dumps(without_nan(record)) + "\n" for record in records)
    try:
        with open(path, "a") as file:
            file.write(lines)
    except OSError as error:
        raise UserError(
            f"--out: cannot write {path} ({error.strerror}); make room, "
            f"then go on with --resume {path.parent}"
        ) from error


def without_nan(record):
    """The record with null for NaN and infinity, which JSON does not have."""
    clean = dict(record)
    for key, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            clean[key] = None
    return clean


# ---- a checkpoint --------------------------------------------------------------------------------


def save_checkpoint(out, step, settings, policy, world):
    """Write checkpoints/step_NNNNNN; older ones beyond --keep go. All ranks call, rank 0 writes.

    Written under another name, fsynced and then renamed, so that nothing half written is ever taken
    for a checkpoint. Returns the folder, or None: on other ranks, and, with a message, where the
    disk is full.
    """
    masters, moments, weights = whole_state(policy, world)
    if world.rank != 0:
        return None
    folder = out / "checkpoints" / f"step_{step:06d}"
    scratch = folder.with_name(f".partial-{folder.name}")
    rank, config = settings.lora_rank, policy.model.config
    state = {"step": step, "updates": policy.optimizer.updates, "moments": moments}
    state["adapters"] = masters if rank else {}
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        lm.save(config, policy.model.generation_config, policy.tokenizer, weights, scratch)
        spell_both_ways(scratch)
        torch.save(state, scratch / "trainer.pt")
        if rank:
            lm.save_adapter(masters, scratch / "adapter.safetensors")
        for file in scratch.iterdir():
            sync(file)
        sync(scratch)
        scratch.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: torch.save's
        shutil.rmtree(scratch, ignore_errors=True)
        message = f"no checkpoint at step {step}: cannot write {folder} ({error})"
        print(f"{message}; the one before is kept", file=sys.stderr, flush=True)
        return None
    remove_old(out, settings.keep)
    return folder


def spell_both_ways(folder):
    """Add to a saved model what transformers 4 calls otherwise; 5 reads both spellings alike."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters") or {}
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:  # 4 takes its own default where it is missing, without a word
            config[name] = rope[name]
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    path.write_text(json.dumps(config, indent=2))
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))


def remove_old(out, keep):
    """Remove all checkpoints but the newest `keep` and the best one by held-out reward."""
    best = f"step_{best_step(out):06d}"
    # a link: somebody has moved it away to keep it
    ours = [p for p in checkpoints_of(out) if p.name != best and not p.is_symlink()]
    for folder in ours[:-keep]:
        # renamed first: half of it is no checkpoint
        shutil.rmtree(folder.rename(folder.with_name(f".partial-{folder.name}")))


@torch.no_grad()
def load_trainer(checkpoint, optimizer):
    """Put the optimizer's moments (and adapters) of a checkpoint back; returns its step.

    Raises UserError where trainer.pt is damaged, or belongs to another model or step.
    """
    with reading(checkpoint):
        # mapped, not read: all ranks of a machine share the pages, and each copies what it keeps
        state = torch.load(checkpoint / "trainer.pt", "cpu", weights_only=True, mmap=True)
        if f"step_{state['step']:06d}" != checkpoint.name:
            raise ValueError("trainer.pt is of another step")
        optimizer.updates = state["updates"]
        for name, master in optimizer.masters.items():
            moments = state["moments"][name]  # none before the first update
            shapes = {"step": (), "exp_avg": master.shape, "exp_avg_sq": master.shape}
            if moments and {key: moment.shape for key, moment in moments.items()} != shapes:
                raise ValueError(f"trainer.pt has other moments than {name} needs")
            optimizer.adamw.state[master] = {key: placed(t, master) for key, t in moments.items()}
            if state["adapters"]:
                master.copy_(placed(state["adapters"][name], master))
    optimizer.publish()
    return state["step"]
