"""A run's folder: one writer, lines that are whole, checkpoints that are complete or not there at all.

    config.json  metrics.jsonl  dialogues.jsonl  heldout.jsonl
    checkpoints/step_NNNNNN/    a plain Hugging Face folder, adapter.safetensors of --lora-rank, trainer.pt with the optimizer's moments, COMPLETE

There is no random state to keep: what a step draws is a function of (seed, step, scenario, member, turn).
"""

import dataclasses
import fcntl
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor, distribute_tensor

import model as lm
from cli import UserError
from report import best_step, checkpoints_of


def claim(out, stack):
    """Hold the run folder until `stack` closes, so that no second run writes there. Raises UserError where one does, or nobody can."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); choose a folder of yours")
    handle = os.open(out, os.O_RDONLY)
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"--out {out}: another run is writing there; let it end, or choose another folder"
        )
    except OSError:
        pass  # a file system that knows no locks


def open_run(settings):
    """The run folder and its newest complete checkpoint, or None where the run begins; what a kill left behind is removed.

    On resume the lines of the steps after that checkpoint go: those steps will be played again, and come out the same.
    Raises UserError where something else stands in the folder.
    """
    out = Path(settings.out or f"runs/{settings.recipe}-{settings.seed}")
    if not settings.resume:
        if out.exists() and (
            not out.is_dir() or any(p.name != ".config.json.tmp" for p in out.iterdir())
        ):
            raise UserError(
                f"--out {out}: something is already there; choose another folder, or go on with --resume {out}"
            )
        return out, None
    complete = checkpoints_of(out)
    for leftover in (out / "checkpoints").glob("*step_*"):
        if (
            re.fullmatch(r"(\.writing-)?step_\d{6,}", leftover.name)
            and leftover not in complete
            and not leftover.is_symlink()
        ):
            shutil.rmtree(leftover)
    for leftover in out.glob(".*.tmp"):
        leftover.unlink()
    done = int(complete[-1].name[5:]) if complete else -1
    for path in (out / "metrics.jsonl", out / "dialogues.jsonl", out / "heldout.jsonl"):
        if path.exists():
            with open(path, "r+b") as file:
                keep = 0
                while (line := file.readline()).endswith(b"\n") and json.loads(line)[
                    "step"
                ] <= done:
                    keep = file.tell()
                file.truncate(keep)
    return out, complete[-1] if complete else None


def begin(out, settings, contents, model, stack):
    """Make the run folder this run's own, now that nothing else can be wrong, and write its settings there, with the digests of its files.

    Raises UserError where not one checkpoint would fit: weights and two moments in fp32 of what is trained, the rest as it is.
    """
    if not settings.resume:
        needed = sum(
            p.numel() * (12 if p.requires_grad else p.element_size()) for p in model.parameters()
        )
        if lack := lacking(next(place for place in (out, *out.parents) if place.exists()), needed):
            raise UserError(
                f"--out {out}: not one checkpoint fits there ({lack}); make room, or choose another folder"
            )
        claim(out, stack)
        open_run(settings)  # nobody else has begun there meanwhile
    saved = dataclasses.asdict(dataclasses.replace(settings, resume="", force=False))
    write_atomically(out / "config.json", json.dumps({**saved, "contents": contents}, indent=1))


def lacking(place, needed):
    """Which room is lacking at `place` for a checkpoint of `needed` bytes, in words; "" where there is enough."""
    free = shutil.disk_usage(place).free
    return (
        f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} are free"
        if free < 1.05 * needed
        else ""
    )


def write_atomically(path, text):
    """Write a file beside `path`, fsync it and rename it into place."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text)
    sync(scratch)
    scratch.rename(path)


def sync(path):
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def append(path, records):
    """Append records to a JSON Lines file, whole lines at once. Raises UserError when the disk is full."""
    known = lambda v: (
        None if isinstance(v, float) and not math.isfinite(v) else v
    )  # JSON has neither NaN nor infinity
    try:
        with open(path, "a") as file:
            file.write(
                "".join(json.dumps({k: known(v) for k, v in r.items()}) + "\n" for r in records)
            )
    except OSError as error:
        raise UserError(
            f"--out: cannot write {path} ({error.strerror}); make room, then go on with --resume {path.parent}"
        )


def save_checkpoint(out, step, settings, model, tokenizer, optimizer, world):
    """Write checkpoints/step_NNNNNN: a plain Hugging Face folder with the fp32 weights, and trainer.pt beside it.

    Written under another name, fsynced, marked COMPLETE and then renamed, so that nothing half-written is ever taken for
    a checkpoint. Older ones beyond --keep go. Returns the folder, or None (with a message) where the disk is full.
    """

    def whole(
        t,
    ):  # FSDP: every rank takes part in gathering it, rank 0 keeps it in the machine's memory
        t = t.full_tensor() if isinstance(t, DTensor) else t
        return t.detach().cpu() if world.rank == 0 else None

    names = {
        id(p): n for n, p in optimizer.params.items()
    }  # a tied weight has one master and two names
    masters = {n: whole(p) for n, p in optimizer.masters.items()}
    moments = {
        n: {k: whole(v) for k, v in optimizer.adamw.state[p].items()}
        for n, p in optimizer.masters.items()
        if p in optimizer.adamw.state
    }
    trained = {
        n: masters[names[id(p)]]
        for n, p in model.named_parameters(remove_duplicate=False)
        if id(p) in names
    }
    frozen = {n: whole(p) for n, p in model.state_dict().items() if n not in trained}
    if world.rank != 0:
        return None
    folder, scratch = (
        out / "checkpoints" / f"step_{step:06d}",
        out / "checkpoints" / f".writing-step_{step:06d}",
    )
    weights = lm.plain_state(model, {**frozen, **trained})
    adapters = masters if settings.lora_rank else {}
    needed = sum(
        t.numel() * t.element_size()
        for m in (weights, adapters, *moments.values())
        for t in m.values()
    )
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        if lack := lacking(scratch, needed):
            raise OSError(28, lack)
        lm.save(model.config, model.generation_config, tokenizer, weights, scratch)
        torch.save(
            {"step": step, "updates": optimizer.updates, "moments": moments, "adapters": adapters},
            scratch / "trainer.pt",
        )
        if adapters:
            lm.save_adapter(
                adapters,
                settings.lora_rank,
                2 * settings.lora_rank,
                scratch / "adapter.safetensors",
            )
        for file in scratch.iterdir():
            sync(file)
        write_atomically(scratch / "COMPLETE", f"step {step}\n")
        sync(scratch)
        scratch.rename(folder)
        sync(folder.parent)
    except (
        OSError,
        SafetensorError,
        RuntimeError,
    ) as error:  # RuntimeError: what torch.save makes of a full disk
        shutil.rmtree(scratch, ignore_errors=True)
        print(
            f"no checkpoint at step {step}: cannot write {folder} ({error}); the one before is kept",
            file=sys.stderr,
            flush=True,
        )
        return None
    best = out / "checkpoints" / f"step_{best_step(out):06d}"
    for old in [p for p in checkpoints_of(out) if p != best and not p.is_symlink()][
        : -settings.keep
    ]:  # a link: somebody has moved it away to keep it
        (old / "COMPLETE").unlink(
            missing_ok=True
        )  # first, so that half a checkpoint never passes for a whole one
        shutil.rmtree(old)
    return folder


def load_trainer(checkpoint, optimizer):
    """Put the optimizer's moments (and adapters) of a checkpoint back; returns its step."""
    state = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
    optimizer.updates = state["updates"]
    with torch.no_grad():
        for name, p in optimizer.masters.items():
            like = lambda t: (
                distribute_tensor(t.to(p.device), p.device_mesh, p.placements)
                if isinstance(p, DTensor)
                else t.to(p.device)
            )
            if name in state["adapters"]:
                p.copy_(like(state["adapters"][name]))
            if name in state["moments"]:
                optimizer.adamw.state[p] = {
                    k: v.to(p.device) if k == "step" else like(v)
                    for k, v in state["moments"][name].items()
                }
    optimizer.publish()
    return state["step"]
