"""A run's folder: one writer, whole lines, checkpoints that are complete or not there at all.

    config.json  metrics.jsonl  dialogues.jsonl  heldout.jsonl
    checkpoints/step_NNNNNN/    a plain Hugging Face folder; trainer.pt, the optimizer's moments;
                                adapter.safetensors of --lora-rank; COMPLETE

There is no random state to keep: what a step draws depends on (seed, step, scenario, member, turn).
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import filelock
import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor, distribute_tensor

import model as lm
from cli import UserError

# ---- what a run folder holds ---------------------------------------------------------------------


def whole_lines(path):
    """The objects of a JSON Lines file, if it is there; a half line, left by a kill, is skipped."""
    with open(path, "rb") if Path(path).exists() else io.BytesIO() as file:
        for line in file:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def config_of(run):
    """The settings of a run, a dict; empty without a config.json."""
    file = Path(run, "config.json")
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def best_step(run):
    """The step of the highest held-out reward, or of the lowest held-out loss; -1 without any."""
    scored = []
    for row in whole_lines(run / "metrics.jsonl"):
        held = row.get("heldout", {})
        if held.get("loss") is not None:
            scored.append((-held["loss"], row["step"]))
        elif held.get("reward") is not None:
            scored.append((held["reward"], row["step"]))
    return max(scored)[1] if scored else -1


def checkpoints_of(run):
    """The complete checkpoints of a run in their order, and not what else stands beside them."""
    complete = [path.parent for path in (run / "checkpoints").glob("step_*/COMPLETE")]
    ours = [path for path in complete if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted(ours, key=lambda path: int(path.name[5:]))


def locate(name):
    """(what to load, its run folder or None). A run folder stands for its best checkpoint.

    Where no held-out reward was measured, or the best is not kept, it is the newest complete one.
    """
    folder = Path(name)
    if (folder / "checkpoints").is_dir():
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


# ---- the folder of this run ----------------------------------------------------------------------


def claim(out, stack):
    """Hold the run folder until `stack` closes. Raises UserError where another run holds it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(filelock.FileLock(out / ".lock", timeout=0))
    except filelock.Timeout as error:
        raise UserError(
            f"--out {out}: another run is writing there; let it end, or choose another folder"
        ) from error
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be made ({error.strerror}); choose a folder of yours"
        ) from error


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
    checkpoints = checkpoints_of(out)
    for folder in (out / "checkpoints").glob("*step_*"):
        ours = re.fullmatch(r"(\.writing-)?step_\d{6,}", folder.name)
        if ours and folder not in checkpoints and not folder.is_symlink():
            shutil.rmtree(folder)
    newest = checkpoints[-1] if checkpoints else None
    done = int(newest.name.removeprefix("step_")) if newest else -1
    for name in ("metrics.jsonl", "dialogues.jsonl", "heldout.jsonl"):
        if (out / name).exists():
            cut_after(out / name, done)
    return out, newest


def refuse_taken(out):
    """Raise UserError where `out` is not a folder, or holds something."""
    litter = {".config.json.tmp", ".lock"}  # of a run that was killed as it began
    if out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= litter):
        raise UserError(
            f"--out {out}: something is already there; choose another folder, "
            f"or go on with --resume {out}"
        )


def cut_after(path, step):
    """Cut a JSON Lines file where a line of a later step begins, or half a line."""
    with open(path, "r+b") as file:
        end = 0
        for line in iter(file.readline, b""):
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            end += len(line)
        file.truncate(end)


def begin(out, settings, contents, model, stack):
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


def write_atomically(path, text):
    """Write a file beside `path`, fsync it and rename it into place."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text)
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

    Written under another name, fsynced, marked COMPLETE and then renamed, so that nothing half
    written is ever taken for a checkpoint. Returns the folder, or None: on other ranks, and, with a
    message, where the disk is full.
    """
    masters, moments, weights = whole_state(policy, world)
    if world.rank != 0:
        return None
    folder = out / "checkpoints" / f"step_{step:06d}"
    scratch = folder.with_name(f".writing-{folder.name}")
    rank, config = settings.lora_rank, policy.model.config
    state = {"step": step, "updates": policy.optimizer.updates, "moments": moments}
    state["adapters"] = masters if rank else {}
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        lm.save(config, policy.model.generation_config, policy.tokenizer, weights, scratch)
        torch.save(state, scratch / "trainer.pt")
        if rank:
            lm.save_adapter(masters, rank, 2 * rank, scratch / "adapter.safetensors")
        for file in scratch.iterdir():
            sync(file)
        write_atomically(scratch / "COMPLETE", f"step {step}\n")
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


def whole_state(policy, world):
    """({name: fp32 master}, {name: {moment: tensor}}, weights of the plain model), on rank 0's CPU.

    Trained weights are the masters. Under FSDP all ranks gather each tensor.
    """

    def whole(tensor):
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        return tensor.detach().cpu() if world.rank == 0 else None

    model, optimizer = policy.model, policy.optimizer
    masters, moments = {}, {}
    for name, master in optimizer.masters.items():
        masters[name] = whole(master)
        state = optimizer.adamw.state.get(master, {})
        moments[name] = {key: whole(tensor) for key, tensor in state.items()}
    name_of = {parameter: name for name, parameter in optimizer.params.items()}
    state = model.state_dict()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in name_of:  # a tied weight has one master and two names
            state[name] = masters[name_of[parameter]]
    for name, tensor in state.items():
        if tensor is not None:
            state[name] = whole(tensor)
    return masters, moments, lm.plain_state(model, state) if world.rank == 0 else None


def remove_old(out, keep):
    """Remove all checkpoints but the newest `keep` and the best one by held-out reward."""
    best = f"step_{best_step(out):06d}"
    # a link: somebody has moved it away to keep it
    ours = [p for p in checkpoints_of(out) if p.name != best and not p.is_symlink()]
    for folder in ours[:-keep]:
        # first, so that half a checkpoint never passes for a whole one
        (folder / "COMPLETE").unlink(missing_ok=True)
        shutil.rmtree(folder)


@torch.no_grad()
def load_trainer(checkpoint, optimizer):
    """Put the optimizer's moments (and adapters) of a checkpoint back; returns its step."""
    state = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
    optimizer.updates = state["updates"]
    for name, master in optimizer.masters.items():
        if name in state["adapters"]:
            master.copy_(placed(state["adapters"][name], master))
        moments = state["moments"].get(name, {})
        optimizer.adamw.state[master] = {key: placed(t, master) for key, t in moments.items()}
    optimizer.publish()
    return state["step"]


def placed(tensor, master):
    """The tensor on the master's device and, where that is sharded, cut into the same shards."""
    tensor = tensor.to(master.device)
    if isinstance(master, DTensor) and tensor.dim():  # without a dimension: AdamW's step count
        return distribute_tensor(tensor, master.device_mesh, master.placements)
    return tensor
