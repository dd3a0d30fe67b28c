"""Runs of train.py as processes of their own, on a tiny model and a scripted judge: shared by test_train.py and test_ranks.py."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import helpers
import torch
from servers import JudgeServer

ROOT = Path(__file__).resolve().parent.parent


def saved_model(folder, kind="llama"):
    """A tiny model and its tokenizer as a Hugging Face folder."""
    model = helpers.tiny(kind)
    model.config.max_position_embeddings = (
        4096  # the shipped dilemmas are long in tokens of the tiny tokenizer
    )
    model.save_pretrained(folder)
    helpers.tokenizer().save_pretrained(folder)
    return str(folder)


def judge(**more):
    """A JSON judge whose score counts the distinct characters of a solution."""
    return JudgeServer(lambda text: min(5.0, len(set(text)) / 8), offers=("json",), **more)


def flags(tiny, url, folder, **more):
    """The command line of a short run: 2 scenarios x 3 dialogues of 2 turns; `more` overrides (steps=5: --steps 5)."""
    made = {
        "model": tiny,
        "judge_url": url,
        "judge_mode": "json",
        "judge_cache": "off",
        "out": str(folder),
        "max_turns": 2,
        "turn_tokens": 6,
        "final_tokens": 8,
        "scenarios_per_step": 2,
        "group_size": 3,
        "steps": 3,
        "agreement": "none",
        "dtype": "fp32",
        "lr": 1e-3,
        "warmup_steps": 3,
        "final_temperature": 0.8,
        **more,
    }
    return [
        x
        for k, v in made.items()
        if v is not None
        for x in ["--" + k.replace("_", "-"), str(v)][: 1 if v is True else 2]
    ]


class Run:
    """train.py at work, by itself or under torchrun; every process of it carries a mark in its environment."""

    def __init__(self, arguments, ranks=0, patch="", cwd=ROOT):
        self.mark, self.patch = f"run-{uuid.uuid4().hex}", patch
        script = (
            ["-c", f"import cli, checkpoint, model as lm, train\n{patch}\ncli.run_cli(train.main)"]
            if patch
            else [str(ROOT / "train.py")]
        )
        launcher = [sys.executable]
        if ranks:
            launcher += [
                "-m",
                "torch.distributed.run",
                f"--nproc_per_node={ranks}",
                "--rdzv-backend=c10d",
                "--rdzv-endpoint=localhost:0",
            ]
            if patch:
                launcher += ["--no-python", sys.executable]
        few = (
            {"CUDA_VISIBLE_DEVICES": ""} if ranks > torch.cuda.device_count() else {}
        )  # each rank needs a card of its own, or none
        env = {
            **os.environ,
            **few,
            "NEGOTIATE_MARK": self.mark,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }
        self.said, self.err = (
            tempfile.TemporaryFile("w+"),
            tempfile.TemporaryFile("w+"),
        )  # a pipe that nobody reads would fill up
        self.process = subprocess.Popen(
            launcher + script + arguments,
            cwd=cwd,
            env=env,
            stdout=self.said,
            stderr=self.err,
            text=True,
            start_new_session=True,
        )

    def wait(self, timeout=150):
        """(exit code, stdout, stderr)"""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self.said.seek(0)
        self.err.seek(0)
        return self.process.returncode, self.said.read(), self.err.read()

    def processes(self):
        """{pid: command line} of all that carry the mark."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (
                    self.mark.encode() in (folder / "environ").read_bytes()
                    and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
                ):
                    found[int(folder.name)] = (
                        (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    )
            except (OSError, ProcessLookupError):  # it has just ended, or is not ours to see
                continue
        return found

    def ranks(self):
        """{rank: pid} of the workers."""
        found = {}
        for pid in self.processes():
            variables = dict(
                v.split("=", 1)
                for v in Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
                if "=" in v
            )
            if "RANK" in variables:
                found[int(variables["RANK"])] = pid
        return found

    def kill(self):
        """kill -9 of everything that carries the mark."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def gone(self, seconds=15):
        """Whether nothing of it is left, now or within `seconds`."""
        return wait_for(lambda: not self.processes(), seconds)


def wait_for(condition, seconds=90):
    """Wait until condition() is true; returns whether it became so."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if condition():
            return True
        time.sleep(0.02)
    return False


def rows(out, name="metrics.jsonl"):
    """The lines of a JSON Lines file of a run ([] if there is none)."""
    path = Path(out, name)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steady(row):
    """A metrics row without what depends on the clock and the machine."""
    return {
        k: v
        for k, v in row.items()
        if "seconds" not in k and k not in ("peak_memory_gb", "tokens_per_second")
    }


def weights(out, step):
    """{name: tensor} of a checkpoint, trainer's moments included."""
    folder = Path(out, "checkpoints", f"step_{step:06d}")
    from safetensors.torch import load_file

    state = torch.load(folder / "trainer.pt", weights_only=True)
    return {
        **load_file(folder / "model.safetensors"),
        **{f"{n}:{k}": v for n, m in state["moments"].items() for k, v in m.items()},
    }


def same(a, b):
    """Whether two dicts of tensors are equal, bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
